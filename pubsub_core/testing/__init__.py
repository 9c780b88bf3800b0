"""Tools for testing a backend: the conformance suite, a fault proxy, a virtual clock.

    from pubsub_core.testing import Harness, suite

    class TestAcme(suite("acme")):
        harness = Harness(url="acme://127.0.0.1:{port}", server="pubsub_acme.dev:Server")

Needs pytest; nothing else of the product imports this package. See ``docs/conformance.md``.
"""

from __future__ import annotations

from .case import Case, case, needs
from .clock import VirtualClock
from .harness import Harness, NativeError
from .links import Link, MemoryLink
from .proxy import Direction, FaultProxy
from .suite import Suite, suite
from .terms import Mode, Need
from .trial import Trial

__all__ = [
    "Case",
    "Direction",
    "FaultProxy",
    "Harness",
    "Link",
    "MemoryLink",
    "Mode",
    "NativeError",
    "Need",
    "Suite",
    "Trial",
    "VirtualClock",
    "case",
    "needs",
    "suite",
]
