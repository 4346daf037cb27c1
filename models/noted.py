"""Settings that remember which of them were read, so that none is passed over in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Noted(Mapping[str, Any]):
    """A view of settings that notes every one whose value is asked for; objects inside are such views too.

    Whether a setting is there, and how many there are, can be asked without a note.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._read: dict[str, Noted | None] = {}  # name -> the view of an object

    def __getitem__(self, name: str) -> Any:
        value = self._settings[name]
        if name not in self._read:
            self._read[name] = Noted(value) if isinstance(value, dict) else None
        found = self._read[name]
        return value if found is None else found

    def __contains__(self, name: object) -> bool:
        return name in self._settings

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def __eq__(self, other: object) -> bool:
        return self._settings == (other._settings if isinstance(other, Noted) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._settings)

    def note(self, prefix: str) -> None:
        """Take every setting whose name begins with `prefix` as read."""
        for name in self._settings:
            if name.startswith(prefix):
                self._read.setdefault(name, None)

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Names and values of what nobody asked for; those inside objects are written as object.name."""
        for name, value in self._settings.items():
            if name not in self._read:
                yield name, value
            elif (inner := self._read[name]) is not None:
                yield from ((f"{name}.{below}", below_value) for below, below_value in inner.unread())
