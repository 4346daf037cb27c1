"""Makes the builders of this folder importable from its rooms (tiny_model, tiny_predictor, live_server)."""
