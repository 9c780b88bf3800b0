"""One test of the contract, and the decorators that make it of a function.

A case is an async function that takes a `pubsub_core.testing.trial.Trial`. `suite` turns
every case into a method of a test class, so cases know nothing of pytest or of any backend.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from pubsub_core.capabilities import Cap

from .terms import Need, Terms
from .trial import Trial

__all__ = ["Case", "case", "cases_of", "needs"]

Body: TypeAlias = Callable[[Trial], Awaitable[None]]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Case(Terms):
    """One test of the contract."""

    body: Body


_WANTS: dict[Body, list[Cap | Need]] = {}


def needs(*wanted: Cap | Need) -> Callable[[Body], Body]:
    """Say what the case below needs.

    Where the backend lacks a `Cap` the case is turned round: the operation must then raise
    `NotSupported`. Where the harness lacks a `Need` the case is listed as not applicable.
    """

    def note(body: Body) -> Body:
        _WANTS.setdefault(body, []).extend(wanted)
        return body

    return note


def case(
    number: int,
    *,
    outage: bool = False,
    fast: bool = True,
    alone: bool = False,
    deadline: float = 30.0,
) -> Callable[[Body], Case]:
    """Make a `Case` of an async function; its name becomes the name of the test."""

    def make(body: Body) -> Case:
        wanted = _WANTS.pop(body, [])
        return Case(
            number=number,
            name=getattr(body, "__name__", str(number)),
            body=body,
            caps=tuple(want for want in wanted if isinstance(want, Cap)),
            needs=tuple(want for want in wanted if isinstance(want, Need)),
            outage=outage,
            fast=fast,
            alone=alone,
            deadline=deadline,
        )

    return make


def cases_of(namespace: Iterable[object]) -> tuple[Case, ...]:
    """Return the cases among the values of a module."""
    return tuple(value for value in namespace if isinstance(value, Case))
