"""What stands in for operators that a device lacks, made of operators that CANN documents for it (soc.py).

They give the same to float16's accuracy, in more launches. Intermediate results go to the device's spare memory: work
on a stream runs in order, so that all of them share it.
"""

from __future__ import annotations

from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.model import Norm
from svdengine.kernels.ascend.tensor import Tensor

_KEEP_TYPE = 0  # cube type: multiply in the operands' own type

# What is needed besides the operators that every model runs, for each operator that a device may lack.
USED: dict[str, tuple[str, ...]] = {
    "aclnnInplaceAdd": ("aclnnSum", "aclnnInplaceCopy"),
    "aclnnInplaceIndexCopy": ("aclnnInplaceCopy",),
    "aclnnInplaceRelu": ("aclnnClampMin", "aclnnInplaceCopy"),
    "aclnnLayerNorm": ("aclnnSum", "aclnnRmsNorm"),
    "aclnnPermute": ("aclnnInplaceCopy",),
    "aclnnRelu": ("aclnnClampMin",),
    "aclnnRotaryPositionEmbedding": ("aclnnSum",),
    "aclnnThreshold": ("aclnnInplaceCopy", "aclnnInplaceGtScalar"),
}


def add(device: AscendDevice, to: Tensor, values: Tensor, factor: float) -> None:
    """to += factor * values, whose shape may lack leading dimensions; values are overwritten where factor is not 1."""
    if factor != 1.0:
        device.run("aclnnInplaceMuls", values, factor)
    total = device.spare(to.shape)
    device.run("aclnnSum", (to, values), total)
    device.run("aclnnInplaceCopy", to, total)


def layer_norm(device: AscendDevice, norm: Norm, epsilon: float, x: Tensor, inverse: Tensor, y: Tensor) -> None:
    """y = the layer norm of rows x (n, columns): RMSNorm of what differs from the row's mean."""
    assert norm.minus_mean is not None and norm.bias is not None
    n, columns = x.shape
    centred, mean = device.spare((n, columns)), device.spare((n, 1), after=n * columns)
    device.run("aclnnMm", x, norm.minus_mean, mean, _KEEP_TYPE)
    device.run("aclnnSum", (x, mean), centred)
    device.run("aclnnRmsNorm", centred, norm.weight, epsilon, y, inverse.leading(n).reshape(n, 1))
    add(device, y, norm.bias, 1.0)


def rotate(device: AscendDevice, x: Tensor, cos: Tensor, sin: Tensor, turn: Tensor, y: Tensor) -> None:
    """y (n, heads, width) = x * cos + (x turned) * sin, for cos and sin (n, 1, width); x is overwritten.

    turn: (width, width), the matrix that swaps a head's halves, the second of them negated.
    """
    n, heads, width = x.shape
    turned = device.spare((n, heads, width))
    flat = n * heads, width
    device.run("aclnnMm", x.reshape(*flat), turn, turned.reshape(*flat), _KEEP_TYPE)
    device.run("aclnnInplaceMul", x, cos)
    device.run("aclnnInplaceMul", turned, sin)
    device.run("aclnnSum", (x, turned), y)


def threshold(device: AscendDevice, x: Tensor, limit: float, y: Tensor) -> None:
    """y = x where it is above the limit, else 0."""
    device.run("aclnnInplaceCopy", y, x)
    device.run("aclnnInplaceGtScalar", y, limit)  # 1 or 0, in y's own type
    device.run("aclnnInplaceMul", y, x)


def relu(device: AscendDevice, x: Tensor, y: Tensor) -> None:
    """y = the ReLU of x."""
    device.run("aclnnClampMin", x, 0.0, y)


def relu_in_place(device: AscendDevice, x: Tensor) -> None:
    """x = its ReLU."""
    positive = device.spare(x.shape)
    relu(device, x, positive)
    device.run("aclnnInplaceCopy", x, positive)


def permute(device: AscendDevice, x: Tensor, dimensions: tuple[int, ...], y: Tensor) -> None:
    """y = x with its dimensions in another order."""
    device.run("aclnnInplaceCopy", y, x.permuted(dimensions))


def put(device: AscendDevice, rows: Tensor, slots: tuple[int, ...], to: Tensor) -> None:
    """Copy rows (n, columns) to these rows of `to`: one copy for each run of neighbours."""
    first = 0
    for index in range(1, len(slots) + 1):
        if index == len(slots) or slots[index] != slots[index - 1] + 1:
            count = index - first
            device.run("aclnnInplaceCopy", to.rows(slots[first], count), rows.rows(first, count))
            first = index
