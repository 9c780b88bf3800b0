"""The whole contract, for lines://."""

from __future__ import annotations

from pubsub_core.testing import Harness, suite


class TestLines(suite("lines")):  # type: ignore[misc]  # the base is made at run time
    """Every case of the suite."""

    harness = Harness(
        url="lines://127.0.0.1:{port}",
        server="pubsub_lines.server:LinesServer",
        restart=True,
        exempt={
            "restart_broker_during_traffic": (
                "a request whose answer was lost is not sent again: the server could not tell "
                "that it is the same one"
            )
        },
    )
