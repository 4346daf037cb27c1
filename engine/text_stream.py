"""The text of one completion while it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Self

from svdengine.scheduling.completion import Completion
from svdengine.scheduling.request import Generation


class TextStream(Iterator[str]):
    """An iterator over pieces of text. Closing it, or dropping it, ends generation and frees its KV blocks."""

    def __init__(
        self,
        request: Generation,
        advance: Callable[[Generation], None],
        abort: Callable[[Generation], None],
        abandon: Callable[[Generation], None],
    ) -> None:
        """`advance` runs a step while the request has no text, `abort` ends it, `abandon` has it ended later."""
        self._request = request
        self._advance = advance
        self._abort = abort
        self._abandon = abandon
        self._cancelled = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        request = self._request
        while not (request.pieces or request.done or self._cancelled):
            self._advance(request)
        if self._cancelled:
            self.close()
            raise StopIteration
        if request.pieces:
            return request.pieces.popleft()
        if request.error is not None:
            raise request.error
        raise StopIteration

    @property
    def completion(self) -> Completion:
        """What was generated so far; all of it after the last piece."""
        return self._request.completion()

    def cancel(self) -> None:
        """Let the iterator end before the next step. It only sets a flag, so a signal handler may call it."""
        self._cancelled = True

    def close(self) -> None:
        """End generation now; text that was not fetched yet can still be."""
        if not self._request.done:
            self._abort(self._request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # The collector may run in the middle of a step, so nothing is changed here.
        request = getattr(self, "_request", None)
        if request is not None and not request.done:
            self._abandon(request)
