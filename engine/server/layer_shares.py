"""Which shares of a layer's FFN neurons the step of a token computed, told in the pieces of a streamed answer."""

from __future__ import annotations

from collections.abc import Sequence

from svdengine.scheduling.request import Generation, LayerCounts
from svdengine.server.framing import Object
from svdengine.server.job import StreamOptions

_DIGITS = 4


def keep_layers(requests: Sequence[Generation], options: StreamOptions) -> None:
    """Have requests keep their neurons by layer, where the client wants to see them."""
    for request in requests:
        request.by_layer = options.include_layers


def with_layers(piece: Object, counts: Sequence[LayerCounts | None]) -> Object:
    """A piece of a stream that tells of the neurons of its tokens too: an entry a token, null where all ran."""
    return {**piece, "svdengine": {"layers": [_shares(each) for each in counts]}}


def _shares(counts: LayerCounts | None) -> Object | None:
    """Two lists with a share a layer; None where nothing was left out: counts of a sparse step have a total."""
    if counts is None or not counts[:, 2].all():
        return None
    predicted, active, total = counts.T
    return {
        "predicted_density": (predicted / total).round(_DIGITS).tolist(),
        "active_density": (active / total).round(_DIGITS).tolist(),
    }
