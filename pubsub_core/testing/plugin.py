"""A pytest plugin for the suite: the option ``--pubsub-suite`` and marks to select by.

Not needed to run the suite. Load it from the top-level ``conftest.py``:

    pytest_plugins = ["pubsub_core.testing.plugin"]
"""

from __future__ import annotations

import os

import pytest

from .case import Case
from .terms import VARIABLE, Mode

__all__: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--pubsub-suite``; it wins over the environment."""
    parser.getgroup("pubsub").addoption(
        "--pubsub-suite",
        choices=[mode.value for mode in Mode],
        help=f"which cases of the conformance suite run, and how hard (or ${VARIABLE})",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the mode before any test module is imported."""
    chosen = config.getoption("--pubsub-suite")
    if chosen is not None:
        os.environ[VARIABLE] = chosen
    config.addinivalue_line("markers", "conformance(number): a case of the conformance suite")
    config.addinivalue_line("markers", "outage: interrupts sessions or servers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each case with its number and kind."""
    for item in items:
        case: object = getattr(getattr(item, "function", None), "pubsub_case", None)
        if isinstance(case, Case):
            item.add_marker(pytest.mark.conformance(case.number))
            if case.outage:
                item.add_marker(pytest.mark.outage)
