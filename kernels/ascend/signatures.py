"""C signatures of what the backend calls in CANN's operator libraries: the one place where they are written down.

Sources: `acl_meta.h` and the headers of `aclnnop/` of CANN 8.1.RC1, and the operator documents of the repositories
cann/ops-nn, ops-math and ops-transformer (aclnnMm, aclnnBatchMatMul, aclnnWeightQuantBatchMatmulV2, aclnnRmsNorm,
aclnnAddRmsNorm, aclnnLayerNorm, aclnnRotaryPositionEmbedding, aclnnIncreFlashAttentionV4, aclnnSoftmax, aclnnEmbedding,
aclnnIndexSelect, aclnnIndexCopy&aclnnInplaceIndexCopy, aclnnPermute, aclnnAdd&aclnnInplaceAdd,
aclnnMul&aclnnInplaceMul, aclnnMuls, aclnnRelu&aclnnInplaceRelu, aclnnThreshold, aclnnSilu, aclnnGeluV2; and, for
substitutes.py, aclnnSum, aclnnInplaceCopy, aclnnClampMin and aclnnGtScalar&aclnnInplaceGtScalar).

An operator is two functions:

    int aclnnXxxGetWorkspaceSize(arguments..., uint64_t* workspace_size, aclOpExecutor** executor)
    int aclnnXxx(void* workspace, uint64_t workspace_size, aclOpExecutor* executor, aclrtStream stream)
"""

from __future__ import annotations

from ctypes import POINTER, c_bool, c_char_p, c_double, c_float, c_int, c_int8, c_int64, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple


class Signature(NamedTuple):
    """ctypes of a function's result and of its parameters."""

    result: Any
    parameters: tuple[Any, ...]


_INT64S = POINTER(c_int64)

# Of libnnopbase.so. Strides and the offset of a tensor are in elements.
DESCRIPTORS: dict[str, Signature] = {
    # view shape, dimensions, type, strides, offset, format, storage shape, dimensions, address
    "aclCreateTensor": Signature(
        c_void_p, (_INT64S, c_uint64, c_int, _INT64S, c_int64, c_int, _INT64S, c_uint64, c_void_p)
    ),
    "aclDestroyTensor": Signature(c_int, (c_void_p,)),
    "aclCreateTensorList": Signature(c_void_p, (POINTER(c_void_p), c_uint64)),
    "aclDestroyTensorList": Signature(c_int, (c_void_p,)),  # destroys its tensors too
    "aclCreateScalar": Signature(c_void_p, (c_void_p, c_int)),
    "aclDestroyScalar": Signature(c_int, (c_void_p,)),
    "aclCreateIntArray": Signature(c_void_p, (_INT64S, c_uint64)),
    "aclDestroyIntArray": Signature(c_int, (c_void_p,)),
    "aclSetAclOpExecutorRepeatable": Signature(c_int, (c_void_p,)),
    "aclDestroyAclOpExecutor": Signature(c_int, (c_void_p,)),
}

# What an operator's argument is. Outputs are tensors like inputs; any tensor may be null where its operator allows it.
KINDS: dict[str, Any] = {
    "tensor": c_void_p,
    "tensors": c_void_p,  # an aclTensorList
    "scalar": c_void_p,
    "integers": c_void_p,  # an aclIntArray
    "int8": c_int8,
    "int": c_int,
    "int64": c_int64,
    "double": c_double,
    "bool": c_bool,
    "text": c_char_p,
}

# Arguments of the first function, in order, outputs last.
OPERATORS: dict[str, str] = {
    "aclnnMm": "tensor tensor tensor int8",  # self, mat2, out, cube type
    "aclnnBatchMatMul": "tensor tensor tensor int8",
    # x, weight, scale, offset, output scale, output offset, bias, group size, y
    "aclnnWeightQuantBatchMatmulV2": "tensor tensor tensor tensor tensor tensor tensor int tensor",
    "aclnnRmsNorm": "tensor tensor double tensor tensor",  # x, gamma, epsilon, y, 1 / rms
    # x1, x2, gamma, epsilon, y, 1 / rms, x1 + x2
    "aclnnAddRmsNorm": "tensor tensor tensor double tensor tensor tensor",
    # input, normalised shape, weight, bias, epsilon, out, mean, 1 / deviation
    "aclnnLayerNorm": "tensor integers tensor tensor double tensor tensor tensor",
    "aclnnRotaryPositionEmbedding": "tensor tensor tensor int64 tensor",  # x, cos, sin, mode, out
    # query, keys, values, shift, mask, lengths, 5 of quantisation, 2 of quantised keys and values, block table,
    # padding, heads, scale, layout, KV heads, block size, precision, out
    "aclnnIncreFlashAttentionV4": "tensor tensors tensors tensor tensor integers tensor tensor tensor tensor tensor"
    " tensor tensor tensor tensor int64 double text int64 int64 int64 tensor",
    "aclnnSoftmax": "tensor int64 tensor",  # self, dimension, out
    "aclnnEmbedding": "tensor tensor tensor",  # weight, indices, out
    "aclnnIndexSelect": "tensor int64 tensor tensor",  # self, dimension, index, out
    "aclnnInplaceIndexCopy": "tensor int64 tensor tensor",  # self, dimension, index, source
    "aclnnPermute": "tensor integers tensor",  # self, dimensions, out
    "aclnnInplaceAdd": "tensor tensor scalar",  # self, other, factor of other
    "aclnnInplaceMul": "tensor tensor",  # self, other
    "aclnnInplaceMuls": "tensor scalar",  # self, other
    "aclnnRelu": "tensor tensor",  # self, out
    "aclnnInplaceRelu": "tensor",
    "aclnnThreshold": "tensor scalar scalar tensor",  # self, threshold, value of what is not above it, out
    "aclnnSilu": "tensor tensor",
    "aclnnGeluV2": "tensor int64 tensor",  # x, approximation (0: none, 1: tanh), y
    "aclnnSum": "tensors tensor",  # summands, out
    "aclnnInplaceCopy": "tensor tensor",  # self, source
    "aclnnClampMin": "tensor scalar tensor",  # self, least, out
    "aclnnInplaceGtScalar": "tensor scalar",  # self, which becomes 1 where it is larger, else 0
}

# How many of the last tensors an operator writes, by default one; those that are named Inplace write their first.
OUTPUTS: dict[str, int] = {"aclnnRmsNorm": 2, "aclnnAddRmsNorm": 3, "aclnnLayerNorm": 3}

RUN = Signature(c_int, (c_void_p, c_uint64, c_void_p, c_void_p))  # workspace, its size, executor, stream

# Our kernels (ops/*.cpp), of which CANN's build makes `uint32_t aclrtlaunch_<kernel>(blocks, stream, arguments...)`:
# addresses first, then numbers.
_KERNELS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "svd_score": (8, (c_uint32,) * 4),
    "svd_gate": (8, (*(c_uint32,) * 5, c_float, c_uint32)),
    "svd_up_down": (8, (c_uint32,) * 5),
    "svd_sum": (3, (c_uint32,) * 2),
}
LAUNCHES: dict[str, Signature] = {
    f"aclrtlaunch_{name}": Signature(c_uint32, (c_uint32, c_void_p, *(c_void_p,) * addresses, *numbers))
    for name, (addresses, numbers) in _KERNELS.items()
}


def signature_of(symbol: str) -> Signature:
    """The signature of any function above, by the name that its library exports."""
    for table in (DESCRIPTORS, LAUNCHES):
        if symbol in table:
            return table[symbol]
    operator = symbol.removesuffix("GetWorkspaceSize")
    if operator == symbol:
        return RUN
    kinds = OPERATORS[operator].split()
    return Signature(c_int, (*(KINDS[kind] for kind in kinds), POINTER(c_uint64), POINTER(c_void_p)))
