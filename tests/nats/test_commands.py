"""The ``pubsub`` command with NATS."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from pubsub_core import connect
from tests.servers import eventually


async def serving(*arguments: str) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pubsub_core.cli", "serve", "nats", "--json", *arguments),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(40):
        return process, json.loads(await process.stdout.readline())


async def ended(process: asyncio.subprocess.Process) -> int:
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(20):
        await process.communicate()
    assert process.returncode is not None
    return process.returncode


async def test_serve_says_where_it_is_ready() -> None:
    process, ready = await serving("--mqtt", "--websocket")
    assert ready["url"] == f"nats://127.0.0.1:{ready['port']}"
    assert ready["pid"]
    async with connect(ready["url"], stream="S", prefix="s", create=True) as bus:
        assert (await bus.publish("a", b"x")).id == "1"
    for url in (ready["websocket_url"], f"{ready['mqtt_url']}?protocol=3.1.1"):
        async with connect(url) as bus:
            await bus.ping()
    assert await ended(process) == 0


async def test_serve_a_cluster() -> None:
    process, ready = await serving("--cluster", "3")
    nodes = ready["nodes"]
    assert len(nodes) == 3
    assert all(node["url"].startswith("nats://127.0.0.1:") and node["pid"] for node in nodes)
    options: dict[str, Any] = {"stream": "S", "prefix": "s", "create": True, "replicas": 3}
    async with connect(ready["url"], **options) as bus:
        assert (await bus.publish("a", b"x")).id == "1"
    assert await ended(process) == 0


async def test_a_killed_command_takes_its_server_along() -> None:
    process, ready = await serving()
    config = Path(f"/proc/{ready['pid']}/cmdline").read_text().split("\0")[2]
    root = Path(config).parent.parent
    assert root.name.startswith("pubsub-nats-")
    process.kill()
    await process.communicate()

    def gone() -> bool:
        try:
            os.kill(ready["pid"], 0)
        except ProcessLookupError:
            return True
        # Where nobody reaps what lost its parent, it stays as a name.
        return "Z" in Path(f"/proc/{ready['pid']}/stat").read_text().rpartition(")")[2].split()[:1]

    await eventually(gone, within=20)
    await eventually(lambda: not root.exists(), within=20)


async def test_the_demonstration_includes_nats() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pubsub_core.cli", "demo", "nats", "--json"),
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(40):
        output, _ = await process.communicate()
    results = [record for line in output.splitlines() if (record := json.loads(line))]
    (result,) = [record for record in results if record["type"] == "result"]
    assert (result["backend"], result["status"]) == ("nats", "ok")
    assert process.returncode == 0
