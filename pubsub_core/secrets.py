"""Values that must not be printed, and the references they come from."""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["Secret"]

_MASK = "***"


class Secret:
    """A value whose every textual form is ``***``; `reveal` gives the value.

    It cannot be pickled or copied into JSON, compares in constant time only through
    `reveal`, and is true when it is not empty.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value itself. Call it where it goes on the wire, nowhere else."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret({_MASK!r})"

    def __str__(self) -> str:
        return _MASK

    def __format__(self, spec: str) -> str:
        return format(_MASK, spec)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled; pass a reference to it instead")

    def __getstate__(self) -> Any:
        raise TypeError("a Secret cannot be copied out; pass a reference to it instead")
