"""The test class of a backend: every case of the contract as a method.

    class TestAcme(suite("acme")):
        harness = Harness(url="acme://127.0.0.1:{port}", server="pubsub_acme.dev:Server")

The methods are plain functions that make their own event loop, so that nothing but pytest is
needed and no setting of pytest-asyncio matters. ``PUBSUB_SUITE`` in the environment selects
`Mode`; cases of other modes are not collected. Nor are cases that the harness cannot run;
``not_applicable`` has them with the reason.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from pubsub_core.capabilities import Cap
from pubsub_core.errors import NotSupported

from .case import Case
from .contract import CASES
from .harness import Harness, is_missing
from .inverse import refused
from .running import perform, run
from .servers import ServerThread, load
from .terms import Mode, mode
from .trial import Ledger, Trial

__all__ = ["Suite", "suite"]

STRESS_TIMES = "PUBSUB_SUITE_TIMES"
"""Environment variable: how many of a case run at once in mode stress (5)."""

SEED = "PUBSUB_SUITE_SEED"
"""Environment variable: the seed of a failed run, to repeat it."""


class Suite:
    """Base of the classes that `suite` makes. Set `harness` in the subclass.

    Attributes:
        backend: Name of the backend.
        not_applicable: Reason by name of each case that the harness cannot run.
    """

    backend: ClassVar[str] = ""
    harness: ClassVar[Harness]
    not_applicable: ClassVar[dict[str, str]] = {}
    ledger: ClassVar[Ledger] = Ledger()

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "harness" not in cls.__dict__:
            return
        cls.ledger = Ledger()
        cls.not_applicable = {}
        chosen = mode()
        for case in CASES:
            reason = cls.harness.missing(case)
            name = f"test_{case.name}"
            if reason is not None:
                cls.not_applicable[case.name] = reason
                setattr(cls, name, None)  # not collected: pytest takes callables only
            elif not case.runs_in(chosen):
                setattr(cls, name, None)

    @classmethod
    def setup_class(cls) -> None:
        """Start the server."""
        harness = cls.harness
        if harness.info.name != cls.backend:
            raise AssertionError(
                f"{harness.url} belongs to {harness.info.name}, the suite is for {cls.backend}"
            )
        if harness.server is not None:
            server = ServerThread(load(harness.server)(**harness.server_options))
            server.start()
            cls.ledger.server = server

    @classmethod
    def teardown_class(cls) -> None:
        """Stop the server."""
        server, cls.ledger.server = cls.ledger.server, None
        if server is not None:
            server.stop()


def suite(backend: str) -> type[Suite]:
    """Return the base class of a backend's conformance tests.

    Args:
        backend: Name of the backend; the harness's URL must belong to it.
    """
    namespace: dict[str, Any] = {"backend": backend, "__doc__": f"The contract, for {backend}."}
    for case in CASES:
        namespace[f"test_{case.name}"] = _method(case)
    return type(f"{backend.capitalize()}Suite", (Suite,), namespace)


def _method(case: Case) -> Callable[[Suite], None]:
    def method(self: Suite) -> None:
        _run(type(self), case)

    method.__name__ = method.__qualname__ = f"test_{case.name}"
    method.__doc__ = case.body.__doc__
    method.__module__ = case.body.__module__
    setattr(method, "pubsub_case", case)  # noqa: B010 - read by `plugin`
    return method


def _run(cls: type[Suite], case: Case) -> None:
    chosen = mode()
    seed = int(os.environ.get(SEED, "0")) or secrets.randbelow(2**31) + 1
    times = int(os.environ.get(STRESS_TIMES, "5")) if chosen is Mode.STRESS else 1
    # pytest shows this where the test fails.
    print(f"{SEED}={seed} repeats this run of case {case.number}")
    trials = [Trial(cls.harness, cls.ledger, case, seed + index) for index in range(times)]

    async def together() -> None:
        await perform(trials, lambda t: _judged(t, case))

    run(together, cls.ledger)


async def _judged(t: Trial, case: Case) -> None:
    """Run the case, or its inverse where a capability that it needs is missing."""
    if not case.caps:
        await case.body(t)
        return
    support = await t.support()
    for cap in case.caps:
        if is_missing(support[cap]):
            print(f"turned round: {cap} is missing ({support[cap].why})")
            await refused(t, cap)
            return
    for cap in case.caps:
        if cap in t.harness.lacks:
            pytest.skip(f"this server lacks {cap}: {t.harness.lacks[cap]}")
    guesses: list[Cap] = [cap for cap in case.caps if not support[cap]]
    if not guesses:
        await case.body(t)
        return
    # The level is unknown: it is tried, and a refusal must be as good as any other.
    try:
        await case.body(t)
    except NotSupported as error:
        print(f"tried, and refused: {error.capability} ({error.why})")
        t.check_refusal(error, guesses)
