"""The README's examples run as they stand."""

from __future__ import annotations

import pytest

from tests.readme import Document, running, said

README = Document("backends/emitter/README.md")
SAYS = [
    ("demo/room/ hello\n['me']\n", ""),
    ("rw\n", ""),
    # The broker's log says why it refused something, which is the point of this example.
    (
        "chat/one one hello 1\n['hello']\nrejected\n",
        r"refused publish of 127\.0\.0\.1:\d+: the key has no w permission\n",
    ),
]

pytestmark = README.needed


def test_every_example_is_expected() -> None:
    assert len(README.blocks("python")) == len(SAYS)


@pytest.mark.parametrize("number", range(len(SAYS)))
async def test_an_example_says_what_it_should(number: int) -> None:
    expected, error = SAYS[number]
    async with running(README.blocks("python")[number]) as process:
        assert await said(process, error=error) == expected
