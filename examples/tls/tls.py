"""Hello over TLS: an own authority, a client certificate, a password by reference.

    python tls.py

All of it stands in ``pubsub.toml`` beside this file; the program does not know.
"""

from __future__ import annotations

import asyncio
import sys

from pubsub_core import ConnectError, connect


async def main() -> None:
    async with connect("main", connect_timeout=5) as bus:
        async with bus.subscribe("example/hello", str) as hellos:
            await bus.publish("example/hello", "hello")
            print((await hellos.get(timeout=5)).payload)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except ConnectError as error:  # TLSProblem and AuthenticationFailed are two of these
        sys.exit(f"{error.code}: {error}")
