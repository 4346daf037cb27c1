"""Errors of CUDA and cuBLAS as DeviceError: what happened, and whether the GPU can still be used by this process."""

from __future__ import annotations

from typing import Any

from svdengine.errors import DeviceError

# After these every call fails until the process ends (CUDA's documentation of cudaError_t: "must be terminated and
# relaunched").
_LASTING = (
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchTimeout",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalInstruction",
    "cudaErrorMisalignedAddress",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
    "cudaErrorAssert",
    "cudaErrorECCUncorrectable",
    "cudaErrorContained",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
)
_MEMORY = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED")


def error_types(cupy: Any) -> tuple[type[Exception], ...]:
    """The exceptions that CuPy raises for errors of the runtime, the driver, cuBLAS and its memory pool."""
    found = [cupy.cuda.memory.OutOfMemoryError, cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError]
    try:
        from cupy_backends.cuda.libs.cublas import CUBLASError
    except ImportError:  # without cuBLAS there are none of its errors
        return tuple(found)
    return (*found, CUBLASError)


def as_device_error(error: Exception) -> DeviceError:
    """The DeviceError that stands for an error of CuPy."""
    said = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError" or any(name in said for name in _MEMORY):
        return DeviceError(
            f"the GPU has no room left: {said}; use a smaller context, fewer sequences, less --gpu-memory, or --device"
            " cpu, and see whether other programs use the GPU (nvidia-smi)"
        )
    if any(name in said for name in _LASTING):
        return DeviceError(
            f"the GPU stopped: {said}; this program cannot use it any more: start it again, and if it happens again,"
            " use --device cpu"
        )
    return DeviceError(f"the GPU refused: {said}")
