"""The dense FFN of a layer of a mixture of experts, whose rows have been routed (kernels/cuda/router.py).

One row, which is what decoding waits for, takes few launches: products with all its blocks at once
(kernels/cuda/expert_row.py). Of several rows the pairs of rows and blocks are sorted by block
(kernels/cuda/pair_groups.py), and a block's weights are read for all its pairs, by the kernels that multiply several
rows of any model, all blocks in one launch. The vendor's library has no part in it: the host would have to know which
rows chose what. No launch depends on that, so that steps of several rows are recorded too.

What is skipped in experts of the ReLU family is the matter of kernels/cuda/sparse.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from svdengine.kernels.cuda import batch_products, batch_sums, elementwise, gemv
from svdengine.kernels.cuda.batch_products import batch_kernel
from svdengine.kernels.cuda.batch_sums import sums_kernel, takes_sums
from svdengine.kernels.cuda.device import Array
from svdengine.kernels.cuda.elementwise import ACTIVATIONS, add_parts
from svdengine.kernels.cuda.expert_row import activate_experts, add_experts
from svdengine.kernels.cuda.formats.table import KERNELS, kernels_of
from svdengine.kernels.cuda.formats.tiles import TILE_COLUMNS, TILE_ROWS
from svdengine.kernels.cuda.gemv import TILE, gemv_kernel, transposed_kernel
from svdengine.kernels.cuda.intrinsics import Kernel
from svdengine.kernels.cuda.model import Blocks, LayerWeights, Matrix
from svdengine.kernels.cuda.norm import Following, add_parts_and_normalize
from svdengine.kernels.cuda.pair_groups import Groups, activate_pairs, add_pairs, gather_rows, group
from svdengine.kernels.cuda.rounding import round_rows_to, takes_integers
from svdengine.kernels.cuda.state import State
from svdengine.kernels.cuda.workspace import parts_of
from svdengine.kernels.formats import WeightFormat

_FEW, _MANY = 8, 16  # pairs of a tile on tensor cores


def reads_rounded(layer: LayerWeights, n: int) -> bool:
    """Whether the dense FFN of n rows reads some of them rounded."""
    formats = [part.matrix.format for part in layer.gate_up]
    return any(map(takes_integers, formats)) or (not _as_one_row(layer, n) and any(map(_has_tiles, formats)))


def dense_experts(
    state: State,
    layer: LayerWeights,
    blocks: Blocks,
    x: Array,
    n: int,
    *,
    rounded: bool = False,
    following: Following | None = None,
) -> bool:
    """work.x += residual_scale * FFN(x) of n rows, all neurons of the blocks that they have.

    `rounded`: x lies in work.fine too. `following`: a norm of work.x that may be made in the same launch as the last
    sum; returns whether it was.
    """
    device, work, config, pairs = state.device, state.work, state.model.config, n * blocks.per_row
    sizes = work.sizes
    read = x
    if rounded:
        read = work.fine
    elif reads_rounded(layer, n):
        read = round_rows_to(device, x, work.rounded, sizes.hidden, n)
    if not _as_one_row(layer, n):
        _add_grouped(state, layer, blocks, x, read, n)
        return False
    of_down = not config.sparse_ffn and takes_integers(layer.down.format)
    own = of_down and read is not work.rounded  # or else a block would write what others still read
    activate_experts(state, layer, blocks, read if takes_integers(layer.up.format) else x, rounded=own)
    if not config.sparse_ffn:
        down_x = work.hidden
        if of_down:
            down_x = work.rounded if own else round_rows_to(device, work.hidden, work.rounded, sizes.ffn, pairs)
        add_experts(state, layer, blocks, down_x, following)
        return following is not None
    parts = blocks.per_row * _sum_rows(state, layer.down, (work.groups, blocks.per_row), pairs, 1)
    if following is not None:
        add_parts_and_normalize(device, config, work, parts, None, n, following)
        return True
    add_parts(
        device, work.partial, parts, None, work.x, config.hidden_size, sizes.hidden, n, config.residual_scale
    )  # fmt: skip
    return False


def _as_one_row(layer: LayerWeights, n: int) -> bool:
    """Whether a step is one row, with gates and ups of one format."""
    return n == 1 and len({part.matrix.format for part in layer.gate_up}) == 1


def _has_tiles(weight_format: WeightFormat) -> bool:
    return KERNELS[weight_format].tiles is not None


def _add_grouped(state: State, layer: LayerWeights, blocks: Blocks, x: Array, read: Array, n: int) -> None:
    """work.x += residual_scale * FFN(x) of n rows; read: them rounded, where a format takes them so."""
    device, work, config = state.device, state.work, state.model.config
    sizes, pairs, down = work.sizes, n * blocks.per_row, layer.down
    of_gates = min(_width(part.matrix, pairs, blocks) for part in layer.gate_up)
    of_down = _sums_width(state, down, n, pairs, blocks) if config.sparse_ffn else _width(down, pairs, blocks)
    first, second = group(device, work, n, blocks.per_row, blocks.count, (of_gates, of_down))
    gathered = None
    for part in layer.gate_up:
        source = read if _has_tiles(part.matrix.format) else x
        if gathered is not source:
            device.launch(
                gather_rows, (-(-sizes.hidden // elementwise.THREADS), pairs), elementwise.THREADS, source, work.order,
                work.second, blocks.per_row, sizes.hidden, sizes.hidden,
            )  # fmt: skip
            gathered = source
        to = work.gate_up[part.offset :]
        _multiply(
            state, part.matrix, blocks.count, work.second, sizes.hidden, to, sizes.gate_up, pairs, first, of_gates
        )
    device.launch(
        activate_pairs, (-(-config.ffn_size // elementwise.THREADS), pairs), elementwise.THREADS, work.gate_up,
        work.hidden, work.order, work.weights, config.ffn_size, sizes.gate_up, sizes.ffn,
        ACTIVATIONS.index(config.activation), int(config.gated), config.activation_threshold,
    )  # fmt: skip
    if config.sparse_ffn:
        parts = _sum_rows(state, down, second, pairs, of_down)
    else:
        down_x, parts = work.hidden, 1
        if _has_tiles(down.format):
            down_x = round_rows_to(device, work.hidden, work.rounded, sizes.ffn, pairs)
        _multiply(
            state, down, blocks.count, down_x, sizes.ffn, work.partial, sizes.hidden, pairs, second, of_down
        )  # fmt: skip
    device.launch(
        add_pairs, (-(-config.hidden_size // elementwise.THREADS), n), elementwise.THREADS, work.partial, work.places,
        work.x, config.hidden_size, sizes.hidden, parts, blocks.per_row, config.residual_scale,
    )  # fmt: skip


def _width(matrix: Matrix, pairs: int, blocks: Blocks) -> int:
    """Pairs that share a read of a block's weights: more where blocks have more pairs."""
    if not _has_tiles(matrix.format):
        return TILE
    return _FEW if pairs <= _FEW * blocks.count else _MANY


def _sums_width(state: State, down: Matrix, n: int, pairs: int, blocks: Blocks) -> int:
    """The same where columns are outputs."""
    if n == 1:
        return 1
    return _width(down, pairs, blocks) if _takes_sums(state, down) else kernels_of(down.format).most_sums


def _takes_sums(state: State, down: Matrix) -> bool:
    """Whether tensor cores add up the rows of a block, which has to have as many as a tile."""
    return takes_sums(down) and state.model.config.ffn_size >= TILE_ROWS


def _multiply(
    state: State,
    matrix: Matrix,
    count: int,
    x: Array,
    x_stride: int,
    y: Array,
    y_stride: int,
    pairs: int,
    groups: Groups,
    width: int,
) -> None:
    """y (pairs, y_stride) = the block of each sorted pair, one of `count` in the matrix, times its row of x."""
    listed, slots = groups
    rows, made = matrix.rows // count, kernels_of(matrix.format).tiles
    if made is None:
        kernel, threads, held = gemv_kernel(matrix.format, 1, TILE, True), gemv.THREADS, gemv.THREADS // 32
    else:
        tiles = -(-width // _FEW)
        kernel, threads = batch_kernel(matrix.format, tiles, True), batch_products.THREADS
        held = made.row_tiles * TILE_ROWS
    state.device.launch(
        kernel, (-(-rows // held) * slots,), threads, *matrix.parts, matrix.bias, x, y, rows, matrix.stride,
        pairs, x_stride, y_stride, 1.0, 0, listed, slots,
    )  # fmt: skip


def _sum_rows(state: State, down: Matrix, groups: Groups, pairs: int, width: int) -> int:
    """work.partial (pairs, parts, hidden) = hidden values of sorted pairs times rows of their blocks.

    Returns the number of parts.
    """
    work, neurons = state.work, state.model.config.ffn_size
    listed, slots = groups
    kernels, parts = kernels_of(down.format), parts_of(pairs)
    if width > 1 and _takes_sums(state, down):
        parts = min(parts, -(-neurons // batch_sums.LEAST_NEURONS))
        kernel, threads = sums_kernel(down.format, -(-width // _FEW), True), batch_sums.THREADS
        columns = down.stride // TILE_COLUMNS
    else:
        parts = min(parts, -(-neurons // gemv.LEAST_NEURONS))
        kernel, threads = transposed_kernel(down.format, width, True), 32 * gemv.SHARERS
        columns = -(-(down.stride // kernels.chunk_columns) // 32)
    state.device.launch(
        kernel, (columns * slots, parts), threads, *down.parts, work.hidden, work.partial, neurons, down.columns,
        down.stride, pairs, work.sizes.ffn, listed, slots,
    )  # fmt: skip
    return parts


def every_kernel() -> Iterator[Kernel]:
    """The kernels of all formats, but for those of other files."""
    for name, kernels in KERNELS.items():
        yield transposed_kernel(name, 1, True)
        if kernels.tiles is None or kernels.tiles.levels is None:
            yield transposed_kernel(name, kernels.most_sums, True)
        if kernels.tiles is None:
            yield gemv_kernel(name, 1, TILE, True)
            continue
        yield from (batch_kernel(name, tiles, True) for tiles in batch_products.TILES)
        if kernels.tiles.levels is not None:
            yield from (sums_kernel(name, tiles, True) for tiles in batch_sums.TILES)
