"""Model families: what a checkpoint calls its settings and tensors, mapped to ModelConfig and canonical tensors."""

from svdengine.models.config import ModelConfig, Rope
from svdengine.models.tensors import TensorSpec, tensor_specs

__all__ = ["ModelConfig", "Rope", "TensorSpec", "tensor_specs"]
