from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import Any, ClassVar

import pytest

from pubsub_core.cli.output import Output
from pubsub_core.cli.serve import _flags, _serve, make_server
from pubsub_core.errors import BadOption, NotSupported
from pubsub_core.plugins import registry
from tests.cli.conftest import DEADLINE, Invoke, Spawn, records


def test_one_line_says_where_it_is_ready(spawn: Spawn) -> None:
    child = spawn("serve", "mqtt", "--json")
    ready = child.record()
    assert ready["type"] == "ready"
    assert ready["backend"] == "mqtt"
    assert ready["host"] == "127.0.0.1"
    assert ready["url"] == f"mqtt://127.0.0.1:{ready['port']}"
    with socket.create_connection((ready["host"], ready["port"]), timeout=5):
        pass
    assert child.end(signal.SIGTERM) == 0
    assert child.rest() == []
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((ready["host"], ready["port"]), timeout=5)


def test_the_line_for_people(spawn: Spawn) -> None:
    child = spawn("serve", "mqtt")
    assert child.line().startswith(b"mqtt ready on mqtt://127.0.0.1:")
    assert child.end(signal.SIGINT) == 0
    assert b"Traceback" not in child.stderr


class Slow:
    """A server that never gets ready."""

    backend: ClassVar[str] = "mqtt"
    url = host = ""
    port = 0

    def __init__(self) -> None:
        self.starting = asyncio.Event()
        self.stopped = False

    async def start(self) -> None:
        self.starting.set()
        await asyncio.Event().wait()

    async def stop(self) -> None:
        self.stopped = True

    def describe(self) -> dict[str, object]:
        return {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_while_starting_stops_the_server(number: signal.Signals) -> None:
    server: Any = Slow()
    async with asyncio.timeout(DEADLINE):
        serving = asyncio.create_task(_serve(Output(json=True), server))
        await server.starting.wait()
        os.kill(os.getpid(), number)
        assert await serving == 0
    assert server.stopped


def test_the_chosen_port(spawn: Spawn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    child = spawn("serve", "mqtt", "--json", "--port", str(port))
    assert child.record()["port"] == port
    assert child.end(signal.SIGTERM) == 0


def test_a_port_that_is_taken_is_a_failure_with_a_remedy(spawn: Spawn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        child = spawn("serve", "mqtt", "--json", "--port", str(taken.getsockname()[1]))
        assert child.end() == 1
    error = records(child.stderr.decode())[-1]
    assert error["type"] == "error"
    assert error["hint"]


def test_a_backend_without_server_is_code_4(invoke: Invoke) -> None:
    result = invoke("serve", "memory", "--json")
    assert result.exit_code == 4
    (error,) = records(result.stderr)
    assert "mqtt" in error["hint"]


def test_an_unknown_name_is_code_2(invoke: Invoke) -> None:
    result = invoke("serve", "mqqt")
    assert result.exit_code == 2
    assert "'mqtt'" in result.stderr


def test_an_unknown_option_of_the_server_is_code_2(invoke: Invoke) -> None:
    result = invoke("serve", "mqtt", "-o", "colour=blue")
    assert result.exit_code == 2
    assert "colour" in result.stderr


class Fake:
    """A server with options of several types."""

    backend: ClassVar[str] = "mqtt"

    def __init__(
        self,
        *,
        host: str = "",
        port: int = 0,
        limit: int = 1,
        strict_mode: bool = False,
        names: list[str] | None = None,
    ) -> None:
        self.given = (host, port, limit, strict_mode)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    info = registry().by_name("mqtt")
    monkeypatch.setattr(registry(), "load_dev_server", lambda _: Fake)
    return info


def test_options_of_the_server_are_converted(fake: Any) -> None:
    made: Any = make_server(fake, "h", 7, {"limit": "3", "strict-mode": "true"})
    assert made.given == ("h", 7, 3, True)


def test_options_of_the_server_are_checked(fake: Any) -> None:
    with pytest.raises(BadOption, match="limit"):
        make_server(fake, "h", 7, {"limit": "many"})
    with pytest.raises(BadOption, match="did you mean 'limit'"):
        make_server(fake, "h", 7, {"limitt": "3"})
    with pytest.raises(BadOption, match="port"):
        make_server(fake, "h", 7, {"port": "3"})


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ((), {}),
        (("--limit", "3"), {"limit": "3"}),
        (("--limit=3", "--names", "a=b"), {"limit": "3", "names": "a=b"}),
        (("--limit", "-3"), {"limit": "-3"}),
        (("--strict-mode", "--limit", "3"), {"strict-mode": "true", "limit": "3"}),
        (("--no-strict-mode",), {"strict-mode": "false"}),
    ],
)
def test_unknown_options_are_the_servers(words: tuple[str, ...], options: dict[str, str]) -> None:
    assert _flags(words) == options


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("hunter2",), "after the backend's name"),
        (("-x",), "belongs to no option"),
        (("--limit", "3", "--limit", "4"), "--limit"),
        (("--limmit", "3"), "did you mean 'limit'"),
    ],
)
def test_options_of_the_server_on_the_command_line_are_checked(
    invoke: Invoke, fake: Any, words: tuple[str, ...], said: str
) -> None:
    result = invoke("serve", "mqtt", *words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert "hunter2" not in result.stderr


def test_memory_has_no_server() -> None:
    with pytest.raises(NotSupported):
        make_server(registry().by_name("memory"), "127.0.0.1", 0)
