"""Makes the shared builders of this folder importable (model_zoo)."""
