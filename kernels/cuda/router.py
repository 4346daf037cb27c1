"""Which FFN blocks rows have in a layer of a mixture of experts (kernels/router.py), chosen on the device.

Nothing of it comes to the host, so that steps of mixtures can be recorded and launched ahead like others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
from numba import cuda

from svdengine.kernels.cuda.atomics import is_last_block
from svdengine.kernels.cuda.chosen import GROUP
from svdengine.kernels.cuda.compact import ballot, below
from svdengine.kernels.cuda.device import Array
from svdengine.kernels.cuda.elementwise import sigmoid
from svdengine.kernels.cuda.gemm import product, rounded_rows
from svdengine.kernels.cuda.intrinsics import FULL, Kernel, jit, kernel, lane_index, warp_index, warp_sum
from svdengine.kernels.cuda.model import Blocks
from svdengine.kernels.cuda.rounding import takes_integers
from svdengine.kernels.cuda.rows import matrix_parameters, row_product
from svdengine.kernels.cuda.state import State
from svdengine.kernels.formats import WeightFormat

CHOOSE_THREADS = 32  # a warp a row
ROUTE_THREADS = 128
# The parameters of a kernel that are what is chosen by, and where that goes.
_CHOICE = (
    "int32* chosen, float32* weights, int32* order, int32* places, int32* groups, int32 experts, int32 active,"
    "int32 per_row, int32 stride, int32 router, float32 factor, int32 gated"
)
ROUTERS = ("softmax", "topk_softmax", "sigmoid")
_SOFTMAX, _SIGMOID = ROUTERS.index("softmax"), ROUTERS.index("sigmoid")
_NOBODY = np.int32(1 << 30)
_ZERO, _ONE, _LOWEST, _BIT = np.float32(0), np.float32(1), np.float32(-np.inf), np.uint32(1)


@jit(device=True)
def score(value, largest, router):
    """What an expert's weight is a share of."""
    return sigmoid(value) if router == _SIGMOID else np.float32(math.exp(value - largest))


@jit(device=True)
def is_taken(taken, i):
    """Whether this lane's expert 32 * i + lane is chosen."""
    return np.uint32(taken >> np.uint32(i)) & _BIT != 0


@jit(device=True)
def likeliest(products, at, experts, taken):
    """The largest product that is not taken, and whose it is, of equal ones the first; a warp's lanes all have it.

    taken: a bit for each of this lane's experts, which are every 32nd. What is not a number counts as the smallest.
    """
    value, expert = _LOWEST, _NOBODY
    for i in range((experts + 31) >> 5):
        e = np.int32(32 * i + lane_index())
        if e < experts and not is_taken(taken, i):
            found = products[at + e]
            found = _LOWEST if found != found else found
            if found > value or expert == _NOBODY:
                value, expert = found, e
    for k in range(5):
        other, owner = cuda.shfl_xor_sync(FULL, value, 1 << k), cuda.shfl_xor_sync(FULL, expert, 1 << k)
        if other > value or (other == value and owner < expert):
            value, expert = other, np.int32(owner)
    return value, expert


@jit(device=True)
def choose_of_row(
    row, products, chosen, weights, order, places, groups, experts, active, per_row, stride, router, factor, gated
):  # fmt: skip
    """List the blocks that a row has, ascending, and what each one's output is multiplied by; by a warp.

    products: (n, stride), what the router makes of the rows; chosen, weights: (n, per_row). Behind the `active` experts
    come those blocks that all rows have, times the sigmoid of one more product where they are `gated`. The first row
    also notes how its pairs are sorted (pair_groups.py), which is how those of a step are that has no other row.
    """
    lane = lane_index()
    at, to, taken, largest = row * stride, row * per_row, np.uint32(0), _ZERO
    for k in range(active):
        value, expert = likeliest(products, at, experts, taken)
        largest = value if k == 0 else largest
        if expert & 31 == lane:
            taken = np.uint32(taken | np.uint32(_BIT << np.uint32(expert >> 5)))
    total, damage = _ZERO, _ZERO
    for i in range((experts + 31) >> 5):
        e = 32 * i + lane
        if e < experts:
            value = products[at + e]
            damage += value - value  # not a number where a product is none, or infinite: sums may hide it
            if router == _SOFTMAX or is_taken(taken, i):
                total += score(value, largest, router)
    total, damage = warp_sum(total), warp_sum(damage)
    found = np.int32(0)
    for i in range((experts + 31) >> 5):
        own = is_taken(taken, i)
        mask = ballot(own)
        if own:
            place = to + found + below(mask, lane)
            chosen[place] = np.int32(32 * i + lane)
            weights[place] = score(products[at + 32 * i + lane], largest, router) / total * factor + damage
        found = np.int32(found + cuda.popc(mask))
    for k in range(active + lane, per_row, 32):
        chosen[to + k] = np.int32(experts + k - active)
        weights[to + k] = sigmoid(products[at + experts]) if gated != 0 else _ONE
    cuda.syncwarp()
    if row == 0:
        for k in range(lane, per_row, 32):
            order[k] = places[k] = np.int32(k)
            groups[GROUP * k] = chosen[k]
            groups[GROUP * k + 1] = np.int32(k)
            groups[GROUP * k + 2] = np.int32(k + 1)


@kernel(f"float32* products, {_CHOICE}", launch_bounds=CHOOSE_THREADS)
def choose_blocks(
    products, chosen, weights, order, places, groups, experts, active, per_row, stride, router, factor, gated
):  # fmt: skip
    """The blocks of each row (blockIdx.x): see `choose_of_row`."""
    choose_of_row(
        cuda.blockIdx.x, products, chosen, weights, order, places, groups, experts, active, per_row, stride, router,
        factor, gated,
    )  # fmt: skip


@cache
def route_kernel(weight_format: WeightFormat) -> Kernel:
    """What a router makes of a step's only row, and the blocks chosen by it. Grid: (blocks of the router's rows,)."""
    dot = row_product(weight_format)

    @kernel(
        f"{matrix_parameters(weight_format)}, uint32* x, int32* tickets, float32* products, {_CHOICE}, int32 rows,"
        "int32 columns",
        name=f"route_{weight_format}",
        launch_bounds=(ROUTE_THREADS, 3),
    )
    def route_row(
        words, scale, low, row, x, tickets, products, chosen, weights, order, places, groups, experts, active, per_row,
        stride, router, factor, gated, rows, columns,
    ):  # fmt: skip
        r, lane = cuda.blockIdx.x * (cuda.blockDim.x >> 5) + warp_index(), lane_index()
        if r < rows:
            total = warp_sum(dot(words, r, scale, low, row, r, columns, x, 0, lane))
            if lane == 0:
                products[r] = total
        if is_last_block(tickets, 0, cuda.gridDim.x) and warp_index() == 0:
            choose_of_row(
                0, products, chosen, weights, order, places, groups, experts, active, per_row, stride, router, factor,
                gated,
            )  # fmt: skip

    return route_row


def route(state: State, blocks: Blocks, x: Array, n: int) -> None:
    """work.blocks and work.weights of n rows, for a router that reads x (n, hidden) float32."""
    device, work, config = state.device, state.work, state.model.config
    sizes, router = work.sizes, blocks.router
    routed = router is not None
    choice = (
        work.routed, work.blocks, work.weights, work.order, work.places, work.groups,
        config.expert_count if routed else 0, config.active_experts if routed else 0, blocks.per_row, sizes.routed,
        ROUTERS.index(config.router), config.expert_scale, int(config.shared_gate and routed),
    )  # fmt: skip
    if router is not None and n == 1 and not takes_integers(router.format):
        device.launch(
            route_kernel(router.format), (-(-router.rows // (ROUTE_THREADS // 32)),), ROUTE_THREADS, *router.parts, x,
            work.tickets, *choice, router.rows, router.stride,
        )  # fmt: skip
        return
    if router is not None:
        read = rounded_rows(device, state.copies, [router], x, work.rounded, sizes.hidden, n)
        product(device, state.copies, router, x, read, sizes.hidden, work.routed, sizes.routed, n)
    device.launch(choose_blocks, (n,), CHOOSE_THREADS, *choice)


def every_kernel() -> Iterator[Kernel]:
    """Routers are always stored in float32."""
    yield route_kernel("f32")
