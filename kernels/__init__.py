"""Executors: one forward step on one device. Everything above this package is device-independent."""

from svdengine.kernels.batch import BLOCK_SIZE, Batch
from svdengine.kernels.executor import Executor, Logits

__all__ = ["BLOCK_SIZE", "Batch", "Executor", "Logits"]
