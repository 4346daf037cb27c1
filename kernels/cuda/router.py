"""Which FFN blocks the rows of a step have in a layer of a mixture of experts, chosen on the device (kernels/router.py).

Nothing of it comes to the host, so that steps of mixtures can be recorded and launched ahead like others.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from svdengine.kernels.cuda.chosen import GROUP
from svdengine.kernels.cuda.compact import ballot, below
from svdengine.kernels.cuda.device import Array
from svdengine.kernels.cuda.elementwise import sigmoid
from svdengine.kernels.cuda.gemm import product
from svdengine.kernels.cuda.intrinsics import FULL, jit, kernel, lane_index, warp_sum
from svdengine.kernels.cuda.model import Blocks
from svdengine.kernels.cuda.state import State

CHOOSE_THREADS = 32  # a warp a row
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


@kernel(
    "float32* products, int32* chosen, float32* weights, int32* order, int32* places, int32* groups, int32 experts,"
    "int32 active, int32 per_row, int32 stride, int32 router, float32 factor, int32 gated",
    launch_bounds=CHOOSE_THREADS,
)
def choose_blocks(
    products, chosen, weights, order, places, groups, experts, active, per_row, stride, router, factor, gated
):  # fmt: skip
    """List the blocks that a row (blockIdx.x) has, ascending, and what each one's output is multiplied by.

    products: (n, stride), what the router makes of the rows; chosen, weights: (n, per_row). Behind the `active` experts
    come those blocks that all rows have, times the sigmoid of one more product where they are `gated`. The first row
    also notes how its pairs are sorted (pair_groups.py), which is how those of a step are that has no other row.
    """
    row, lane = cuda.blockIdx.x, lane_index()
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


def route(state: State, blocks: Blocks, x: Array, n: int) -> None:
    """work.blocks and work.weights of n rows, for a router that reads x (n, hidden) float32."""
    device, work, config = state.device, state.work, state.model.config
    sizes, router = work.sizes, blocks.router
    if router is not None:
        product(device, state.copies, router, x, x, sizes.hidden, work.routed, sizes.routed, n)
    experts = config.expert_count if router is not None else 0
    device.launch(
        choose_blocks, (n,), CHOOSE_THREADS, work.routed, work.blocks, work.weights, work.order,
        work.places, work.groups, experts, config.active_experts if router is not None else 0, blocks.per_row, sizes.routed, ROUTERS.index(config.router),
        config.expert_scale, int(config.shared_gate and router is not None),
    )  # fmt: skip
