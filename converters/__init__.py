"""Offline: a checkpoint becomes a model file."""
