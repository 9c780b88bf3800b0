"""What counts as entitlements."""

from __future__ import annotations

import pytest

from pubsub_core import EVERYTHING
from pubsub_core._runtime.questions import entitlements_of


@pytest.mark.parametrize(
    "given", [True, 1, "12", b"\x01", {1: "x"}, {True}, {"1"}, [1.0], [[1]], object()]
)
def test_nothing_else_counts_as_entitlements(given: object) -> None:
    with pytest.raises(TypeError):
        entitlements_of(given)


def test_entitlements_are_any_collection_of_numbers_or_none() -> None:
    assert entitlements_of(None) is None
    assert entitlements_of(EVERYTHING) is EVERYTHING
    assert entitlements_of(()) == frozenset()
    assert entitlements_of(iter([1, 2, 1])) == frozenset({1, 2})
