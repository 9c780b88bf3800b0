"""The programs and the table in ``backends/mqtt/README.md``."""

from __future__ import annotations

import pytest

from pubsub_mqtt.server import MosquittoServer
from tests.readme import Document, running, said

README = Document("backends/mqtt/README.md")
EXPECTED = [
    ["broker", "oven b'81.5'"],
    ["b'80.9'"],
    ["lab/oven => b'hot'"],
    [],
]

pytestmark = README.needed


def test_every_program_is_expected() -> None:
    assert len(README.blocks("python")) == len(EXPECTED)


@pytest.mark.parametrize("number", range(len(EXPECTED)))
async def test_programs_print_what_they_say(mosquitto: MosquittoServer, number: int) -> None:
    program = README.blocks("python")[number].replace("mqtt://localhost", mosquitto.url)
    async with running(program) as process:
        assert (await said(process)).splitlines() == EXPECTED[number]
