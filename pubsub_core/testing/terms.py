"""The name, the needs and the modes of a case of the contract."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum

from pubsub_core.capabilities import Cap

__all__ = ["VARIABLE", "Mode", "Need", "Terms", "mode"]

VARIABLE = "PUBSUB_SUITE"
"""Environment variable that selects the mode."""


class Mode(StrEnum):
    """Which cases run, and how hard."""

    DEFAULT = "default"
    """`QUICK`, and the outage cases that take less than a second or two."""
    QUICK = "quick"
    """Everything that needs no outage."""
    FULL = "full"
    """Every case, with the large numbers."""
    STRESS = "stress"
    """Every case that needs no server of its own, several at a time with random seeds."""
    OUTAGE = "outage"
    """Only the cases in which the connection or the server fails, with the large numbers."""


class Need(StrEnum):
    """A need of a case; the value is the reason where the harness lacks it."""

    CUT = "no way to interrupt the session"
    """The session can be cut: a fault proxy, or hooks of the backend."""
    WIRE = "no wire"
    """There is a TCP connection, which a fault proxy can delay, swallow and cut."""
    RESTART = "the server cannot be restarted"
    UNPRIVILEGED = "no identity without rights is configured"
    SECOND = "no second identity is configured"
    AUTHORIZER = "no identity that may authorize is configured"
    BAD_CREDENTIALS = "no wrong credentials are configured"
    KEEPALIVE = "the backend has no keepalive"
    CLIENT_LIBRARY = "the backend needs no client library"
    RATE = "the backend declares no rate limit"
    PAYLOAD_LIMIT = "the backend declares no payload limit"
    DOLLAR = "the broker does not let clients publish to topics that begin with $"
    NATIVE_ERRORS = "no replies of a faulty server are configured"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Terms:
    """A test of the contract, without the test itself.

    Attributes:
        number: Position in the suite; it never changes.
        name: Without ``test_``.
        outage: Whether the case interrupts sessions; it then runs in mode outage.
        fast: Whether an outage case also runs by default.
        alone: Whether it measures the process, so that no other may run beside it.
        deadline: Seconds for the whole case, before the harness's factor.
    """

    number: int
    name: str
    caps: tuple[Cap, ...] = ()
    needs: tuple[Need, ...] = ()
    outage: bool = False
    fast: bool = True
    alone: bool = False
    deadline: float = 30.0

    def runs_in(self, chosen: Mode) -> bool:
        """Whether the case belongs to that mode."""
        match chosen:
            case Mode.QUICK:
                return not self.outage and self.fast
            case Mode.FULL:
                return True
            case Mode.OUTAGE:
                return self.outage
            case Mode.STRESS:
                return not self.alone and Need.RESTART not in self.needs
            case Mode.DEFAULT:
                return self.fast


def mode() -> Mode:
    """Return the chosen mode, from the environment variable ``PUBSUB_SUITE``."""
    text = os.environ.get(VARIABLE, Mode.DEFAULT.value)
    try:
        return Mode(text)
    except ValueError:
        raise ValueError(
            f"{VARIABLE}={text!r}; choose one of {', '.join(mode.value for mode in Mode)}"
        ) from None
