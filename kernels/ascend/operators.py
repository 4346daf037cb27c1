"""What a step asks of CANN's operators, by what it does: products, norms, activations, copies of rows.

Sources of what each accepts: its entry in CANN's operator documentation, named in signatures.py. Tensors are float16
and contiguous unless said otherwise. Where a device lacks an operator, others stand in for it (substitutes.py).
"""

from __future__ import annotations

from itertools import accumulate

from svdengine.kernels.ascend import substitutes
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.model import HalfMatrix, Matrix, Norm, Projection, Projections
from svdengine.kernels.ascend.soc import Soc
from svdengine.kernels.ascend.tensor import Tensor
from svdengine.models import ModelConfig
from svdengine.models.config import Activation

_KEEP_TYPE = 0  # cube type: multiply in the operands' own type
_HALVES = 0  # mode of rotary embedding: dimension i pairs with i + head_dim / 2
_EXACT, _TANH = 0, 1  # approximations of GELU


def needed_operators(config: ModelConfig, soc: Soc) -> tuple[str, ...]:
    """The operators that a model of this config runs on such a device, but for those that it can do without."""
    names = ["aclnnMm", "aclnnBatchMatMul", "aclnnSoftmax", "aclnnEmbedding", "aclnnIndexSelect"]
    names += ["aclnnInplaceIndexCopy", "aclnnPermute", "aclnnInplaceAdd", "aclnnInplaceMul", "aclnnInplaceMuls"]
    names += ["aclnnRmsNorm"] if config.norm == "rms" or config.qk_norm else []
    names += ["aclnnAddRmsNorm"] if config.norm == "rms" and config.residual_scale == 1.0 else []
    names += ["aclnnLayerNorm"] if config.norm == "layer" else []
    names += ["aclnnRotaryPositionEmbedding"] if config.rope is not None else []
    names += ["aclnnInplaceRelu"] if config.activation == "drelu" else []
    names.append(_ACTIVATIONS[config.activation])
    return tuple(
        dict.fromkeys(used for name in names for used in ((name,) if soc.has(name) else substitutes.USED[name]))
    )


def multiply(device: AscendDevice, matrix: Matrix, x: Tensor, y: Tensor) -> None:
    """y (n, rows) = x (n, columns) times a matrix (rows, columns)."""
    if isinstance(matrix, HalfMatrix):
        device.run("aclnnMm", x, matrix.rows.transposed, y, _KEEP_TYPE)
        return
    arguments = (x, matrix.weights, matrix.scales, None, None, None, None, matrix.group, y)
    device.run("aclnnWeightQuantBatchMatmulV2", *arguments)


def project(device: AscendDevice, projection: Projection, x: Tensor, y: Tensor, *, turned: bool = False) -> None:
    """y (n, rows) = x (n, columns) times a matrix, plus its bias. turned: the matrix is (columns, rows)."""
    if turned:
        assert isinstance(projection.matrix, HalfMatrix)
        device.run("aclnnMm", x, projection.matrix.rows, y, _KEEP_TYPE)
    else:
        multiply(device, projection.matrix, x, y)
    if projection.bias is not None:
        add(device, y, projection.bias)


def project_all(device: AscendDevice, projections: Projections, x: Tensor, flat: Tensor) -> list[Tensor]:
    """The products (n, rows) of rows x (n, columns) with several matrices, each contiguous, in a flat tensor.

    For one row they are one product, whose results lie side by side.
    """
    n, ends = x.shape[0], list(accumulate(rows_of(part.matrix) for part in projections.parts))
    starts = [0, *ends[:-1]]
    results = [flat.rows(n * a, n * (b - a)).reshape(n, b - a) for a, b in zip(starts, ends, strict=True)]
    if n == 1 and projections.joined is not None:
        project(device, projections.joined, x, flat.leading(ends[-1]).reshape(1, ends[-1]))
        return results
    for part, result in zip(projections.parts, results, strict=True):
        project(device, part, x, result)
    return results


def rows_of(matrix: Matrix) -> int:
    """Outputs of a product."""
    return matrix.rows.shape[0] if isinstance(matrix, HalfMatrix) else matrix.weights.shape[1]


def add(device: AscendDevice, to: Tensor, values: Tensor, factor: float = 1.0) -> None:
    """to += factor * values, whose shape may lack leading dimensions. Values that have a factor may be overwritten."""
    if device.soc.has("aclnnInplaceAdd"):
        device.run("aclnnInplaceAdd", to, values, factor)
    else:
        substitutes.add(device, to, values, factor)


def scale(device: AscendDevice, x: Tensor, factor: float) -> None:
    """x *= factor; nothing for a factor of 1."""
    if factor != 1.0:
        device.run("aclnnInplaceMuls", x, factor)


def normalize(device: AscendDevice, config: ModelConfig, norm: Norm, x: Tensor, inverse: Tensor, y: Tensor) -> None:
    """y (n, hidden) = the model's kind of norm of x. inverse: (n or more,) float32, overwritten."""
    if config.norm == "rms":
        rms_norm(device, norm, config.norm_eps, x, inverse, y)
    elif device.soc.has("aclnnLayerNorm"):
        device.run("aclnnLayerNorm", x, x.shape[-1:], norm.weight, norm.bias, config.norm_eps, y, None, None)
    else:
        substitutes.layer_norm(device, norm, config.norm_eps, x, inverse, y)


def add_and_normalize(
    device: AscendDevice,
    config: ModelConfig,
    norm: Norm,
    x: Tensor,
    added: Tensor,
    inverse: Tensor,
    y: Tensor,
    total: Tensor,
) -> Tensor:
    """y = the norm of x + residual_scale * added. Returns the sum: `total` where one operator does both, else x."""
    if config.norm == "rms" and config.residual_scale == 1.0:
        n = x.shape[0]
        inverse = inverse.leading(n).reshape(n, 1)
        device.run("aclnnAddRmsNorm", x, added, norm.weight, config.norm_eps, y, inverse, total)
        return total
    add(device, x, added, config.residual_scale)
    normalize(device, config, norm, x, inverse, y)
    return x


def rms_norm(device: AscendDevice, norm: Norm, epsilon: float, x: Tensor, inverse: Tensor, y: Tensor) -> None:
    """y (n, columns) = x over the root of its mean square, times the weight."""
    n = x.shape[0]
    device.run("aclnnRmsNorm", x, norm.weight, epsilon, y, inverse.leading(n).reshape(n, 1))


def rotate(
    device: AscendDevice, x: Tensor, heads: int, cos: Tensor, sin: Tensor, turn: Tensor | None, y: Tensor
) -> None:
    """y = rows x (n, heads * head_dim), each head turned by its row's angles, whose cosines are (n, head_dim).

    turn: Model.turn. x may be overwritten.
    """
    n, width = cos.shape
    if turn is not None:
        by_head, by_row = (n, heads, width), (n, 1, width)
        angles = cos.reshape(*by_row), sin.reshape(*by_row)
        substitutes.rotate(device, x.reshape(*by_head), *angles, turn, y.reshape(*by_head))
        return
    angles = (cos.reshape(1, n, 1, width), sin.reshape(1, n, 1, width))
    shape = (1, n, heads, width)
    device.run("aclnnRotaryPositionEmbedding", x.reshape(*shape), *angles, _HALVES, y.reshape(*shape))


def look_up(device: AscendDevice, table: Tensor, indices: Tensor, rows: Tensor) -> None:
    """rows (n, columns) = rows of a table by their int32 indices (n,)."""
    device.run("aclnnEmbedding", table, indices, rows)


def gather(device: AscendDevice, source: Tensor, indices: Tensor, rows: Tensor) -> None:
    """The same for sources that are no weights."""
    device.run("aclnnIndexSelect", source, 0, indices, rows)


def permute(device: AscendDevice, x: Tensor, dimensions: tuple[int, ...], y: Tensor) -> None:
    """y = x with its dimensions in another order."""
    if device.soc.has("aclnnPermute"):
        device.run("aclnnPermute", x, dimensions, y)
    else:
        substitutes.permute(device, x, dimensions, y)


def put(device: AscendDevice, rows: Tensor, indices: Tensor, to: Tensor) -> None:
    """Copy rows (n, columns) to the rows of `to` with the int32 indices (n,), which are distinct.

    Along the first dimension CANN scatters in place (cann/ops-nn, aclnn_index_copy.cpp), along others it transposes.
    """
    device.run("aclnnInplaceIndexCopy", to, 0, indices, rows)


# The operator of each activation's first factor; fatrelu alone has arguments.
_ACTIVATIONS: dict[Activation, str] = {
    "relu": "aclnnRelu",
    "drelu": "aclnnRelu",
    "relu2": "aclnnRelu",
    "fatrelu": "aclnnThreshold",
    "silu": "aclnnSilu",
    "gelu": "aclnnGeluV2",
    "gelu_tanh": "aclnnGeluV2",
}


def activate(device: AscendDevice, activation: Activation, threshold: float, x: Tensor, y: Tensor) -> None:
    """y = the activation of x, both of one shape. y may not be x. threshold: that of fatrelu."""
    name = _ACTIVATIONS[activation]
    if not device.soc.has(name):
        if activation == "fatrelu":
            substitutes.threshold(device, x, threshold, y)
        else:
            substitutes.relu(device, x, y)
    elif activation == "fatrelu":
        device.run(name, x, threshold, 0.0, y)
    elif activation in ("gelu", "gelu_tanh"):
        device.run(name, x, _TANH if activation == "gelu_tanh" else _EXACT, y)
    else:
        device.run(name, x, y)
    if activation == "relu2":
        device.run("aclnnInplaceMul", y, y)


def relu_in_place(device: AscendDevice, x: Tensor) -> None:
    """x = its ReLU."""
    if device.soc.has("aclnnInplaceRelu"):
        device.run("aclnnInplaceRelu", x)
    else:
        substitutes.relu_in_place(device, x)
