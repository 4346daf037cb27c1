"""Programs for developers and researchers."""
