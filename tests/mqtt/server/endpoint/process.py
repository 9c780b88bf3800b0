"""A server of an endpoint in a process of its own, to be attacked and measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from tests.watched import Watched

__all__ = ["Process", "allow_sockets", "process"]

# What makes the server defines `server` and, where more than its counters is told, `more`.
_CHILD = """
import asyncio, dataclasses, json, logging, sys

def more(server):
    return {{}}

{made}

async def main():
    logging.basicConfig(level=logging.ERROR)
    dialect = server.dialect
    dialect.profile = dataclasses.replace(dialect.profile, **json.loads(sys.argv[1]))
    async with server:
        print(server.port, flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            told = dataclasses.asdict(server.stats) | {{"links": len(server.links)}}
            print(json.dumps(told | more(server)), flush=True)

asyncio.run(main())
"""


@dataclass
class Process:
    """A server in another process."""

    child: asyncio.subprocess.Process
    port: int

    def __post_init__(self) -> None:
        self.watched = Watched(self.child.pid)

    async def stats(self) -> dict[str, int]:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(b"\n")
        async with asyncio.timeout(10):
            found: dict[str, int] = json.loads(await self.child.stdout.readline())
        return found

    async def quiet(self, links: int = 1) -> dict[str, int]:
        """Return the counters once no more than so many clients are connected."""
        async with asyncio.timeout(10):
            while (stats := await self.stats())["links"] > links:
                await asyncio.sleep(0.01)
        return stats


@contextlib.asynccontextmanager
async def process(made: str, *arguments: str, **profile: Any) -> AsyncIterator[Process]:
    """Yield a server that must end by itself, and with nothing to complain of.

    *made* is Python that makes it; *arguments* are ``sys.argv[2:]`` there. *profile* changes
    that of its dialect.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", _CHILD.format(made=made),
        json.dumps(profile), *arguments,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        async with asyncio.timeout(20):
            port = int(await child.stdout.readline())
        yield Process(child, port)
        async with asyncio.timeout(20):
            _, complaints = await child.communicate(b"")
        assert child.returncode == 0
        assert complaints.decode() == ""
    finally:
        if child.returncode is None:
            child.kill()
            await child.communicate()


def allow_sockets() -> None:
    """Allow a thousand sockets here, and in the servers, which inherit the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096 <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
