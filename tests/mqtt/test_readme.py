"""The programs and the table in ``backends/mqtt/README.md``."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from pubsub_core.config.options import field_help
from pubsub_mqtt.options import MQTTOptions
from pubsub_mqtt.server import MosquittoServer

README = (Path(__file__).parents[2] / "backends" / "mqtt" / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXPECTED = [
    ["broker", "oven b'81.5'"],
    ["b'80.9'"],
    ["lab/oven => b'hot'"],
    [],
]


def test_every_program_is_expected() -> None:
    assert len(PROGRAMS) == len(EXPECTED)


@pytest.mark.parametrize("number", range(len(EXPECTED)))
async def test_programs_print_what_they_say(mosquitto: MosquittoServer, number: int) -> None:
    program = PROGRAMS[number].replace("mqtt://localhost", mosquitto.url)
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        "-c",
        program,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        out, error = await child.communicate()
    assert (error.decode(), child.returncode) == ("", 0)
    assert out.decode().splitlines() == EXPECTED[number]


def test_the_options_table_is_that_of_the_options() -> None:
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for option in field_help(MQTTOptions):
        default = f"`{option.default}`" if option.default else ""
        rows.append(f"| `{option.name}` | {default} | {option.help} |")
    assert "\n".join(rows) in README
