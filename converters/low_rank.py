"""Truncation-aware SVD: the projection of a matrix's outputs that loses least on given inputs.

For inputs with second moment C, the best rank-r approximation of W x in E ||D (W - A B) x||^2 is A = D^-1 U_r,
B = U_r^T D W, where U_r are the leading left singular vectors of D W C^(1/2) (Eckart and Young 1936, applied to the
whitened matrix). This form needs no inverse of C^(1/2), so a singular C is no difficulty. D weights the outputs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EXACT_SIZE = 768  # up to this d the decomposition is exact; above it, by subspace iteration
_OVERSAMPLING = 16
_ITERATIONS = 5


def leading_directions(
    matrix: NDArray[np.float32], moment: NDArray[np.float64] | None, rank: int, seed: int = 0
) -> NDArray[np.float32]:
    """The top `rank` left singular vectors U (f, rank) of matrix (f, d) times moment^(1/2), in descending order.

    `moment` (d, d) is symmetric and positive semidefinite; None stands for the identity. Raises ValueError when the
    rank is not within 1..min(f, d).
    """
    f, d = matrix.shape
    if not 1 <= rank <= min(f, d):
        raise ValueError(f"the rank must lie in 1..{min(f, d)} for a matrix of {f} x {d}, found {rank}")
    if d <= EXACT_SIZE:
        return _exact(matrix, moment, rank)
    return _by_iteration(matrix, moment, rank, seed)


def _exact(matrix: NDArray[np.float32], moment: NDArray[np.float64] | None, rank: int) -> NDArray[np.float32]:
    product = matrix.astype(np.float64)
    if moment is not None:
        values, vectors = np.linalg.eigh(moment)
        product = (product @ vectors) * np.sqrt(np.maximum(values, 0))  # another root of C: U is the same
    if 2 * rank > min(product.shape):
        u = np.linalg.svd(product, full_matrices=False)[0]
        return np.ascontiguousarray(u[:, :rank], np.float32)
    # The leading ones lose nothing that shows by squaring, which takes a fifth of the time.
    v = np.linalg.eigh(product.T @ product)[1][:, ::-1][:, :rank]
    return np.ascontiguousarray(np.linalg.qr(product @ v)[0], np.float32)


def _by_iteration(
    matrix: NDArray[np.float32], moment: NDArray[np.float64] | None, rank: int, seed: int
) -> NDArray[np.float32]:
    """Subspace iteration on W C W^T (Halko, Martinsson and Tropp 2011, algorithm 4.4), then Rayleigh-Ritz."""
    f, d = matrix.shape
    width = min(rank + _OVERSAMPLING, f, d)
    scale = 1.0 if moment is None else float(np.trace(moment)) / d or 1.0
    c = None if moment is None else (moment / scale).astype(np.float32)

    def apply(q: NDArray[np.float32]) -> NDArray[np.float32]:
        inner: NDArray[np.float32] = matrix.T @ q
        if c is not None:
            inner = c @ inner
        return matrix @ inner

    q = matrix @ np.random.default_rng(seed).standard_normal((d, width)).astype(np.float32)
    q = np.linalg.qr(q)[0]
    for _ in range(_ITERATIONS):
        q = np.linalg.qr(apply(q))[0]
    small = q.T @ apply(q)
    vectors = np.linalg.eigh((small + small.T) / 2)[1]
    return np.ascontiguousarray(q @ vectors[:, ::-1][:, :rank])
