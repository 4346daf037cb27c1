"""Offline: a checkpoint (Hugging Face folder or GGUF file) becomes a `.svdp` model file."""

from svdengine.converters.conversion import convert

__all__ = ["convert"]
