"""Dialling step by step: what it waits for, and what it leaves behind."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pubsub_mqtt.connection.address import BrokerAddress, TLSSettings
from pubsub_mqtt.connection.dial import (
    Call,
    Dial,
    Wait,
    advance,
    dial_blocking,
    dial_steps,
    wait_ready,
)

HOST = "127.0.0.1"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((HOST, 0)) as server:
        yield server


@pytest.fixture
def full() -> Iterator[socket.socket]:
    """A listener whose backlog is full: it answers no connection and refuses none."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind((HOST, 0))
        server.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield server


@pytest.fixture
def refusing() -> Iterator[tuple[str, int]]:
    with socket.socket() as sock:
        sock.bind((HOST, 0))  # nobody listens
        yield sock.getsockname()


def resolve_to(patch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    patch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def to(sock: socket.socket) -> BrokerAddress:
    return BrokerAddress(HOST, sock.getsockname()[1])


def opened(steps: Dial) -> dict[int, socket.socket]:
    """The sockets that a dial under way holds, by descriptor."""
    frame: Any = steps
    while frame.gi_yieldfrom is not None:
        frame = frame.gi_yieldfrom
        if "pending" in frame.gi_frame.f_locals:
            return {fd: sock for fd, (_, sock) in frame.gi_frame.f_locals["pending"].items()}
    return {}


def test_a_literal_address_asks_no_name_server(listener: socket.socket) -> None:
    step = None
    with contextlib.suppress(StopIteration):
        step = next(dial_steps(to(listener)))
    assert not isinstance(step, Call)


def test_a_name_is_resolved_by_the_driver() -> None:
    steps = dial_steps(BrokerAddress("broker.example"))
    assert isinstance(next(steps), Call)
    steps.close()


def test_certificates_are_read_before_anything_is_opened(tmp_path: Path) -> None:
    tls = TLSSettings(ca_file=str(tmp_path / "none.pem"))
    step = next(dial_steps(BrokerAddress("broker.example", tls=tls)))
    assert isinstance(step, Call)
    assert step.work == tls.build


def test_the_next_address_is_tried_beside_one_that_is_silent(
    full: socket.socket, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, full.getsockname(), listener.getsockname())
    steps = dial_steps(BrokerAddress("two.example"), 10)
    wait = advance(steps)
    assert len(wait.writes) == 1
    assert wait.until is not None
    assert wait.until - time.monotonic() < 1, "it would wait for the deadline"
    (silent,) = opened(steps).values()
    try:
        wait = advance(steps, ())
        assert set(wait.writes) > {silent.fileno()}
        while True:
            wait = advance(steps, [each for each in wait_ready(wait) if each != silent.fileno()])
    except StopIteration as done:
        with contextlib.closing(done.value) as sock:
            assert sock.fileno() >= 0
    assert silent.fileno() == -1, "the one that lost is left open"


def test_an_address_that_refuses_costs_no_wait(
    refusing: tuple[str, int], listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, refusing, listener.getsockname())
    with contextlib.closing(dial_blocking(BrokerAddress("two.example"), 10)):
        pass


def test_of_several_failures_that_of_the_first_address_is_told(
    refusing: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    unusable = ("255.255.255.255", 1)  # TCP has no broadcast
    resolve_to(monkeypatch, refusing, unusable)
    with pytest.raises(ConnectionRefusedError):
        dial_blocking(BrokerAddress("two.example"), 10)
    resolve_to(monkeypatch, unusable, refusing)
    with pytest.raises(OSError) as caught:
        dial_blocking(BrokerAddress("two.example"), 10)
    assert not isinstance(caught.value, ConnectionRefusedError)


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch)
    with pytest.raises(OSError, match=r"none\.example has no address"):
        dial_blocking(BrokerAddress("none.example"), 10)


def test_the_deadline_is_for_all_of_it(full: socket.socket) -> None:
    steps = dial_steps(to(full), 0.01)
    wait = advance(steps)
    (silent,) = opened(steps).values()
    assert wait_ready(wait) == []
    with pytest.raises(TimeoutError, match="did not answer in time"):
        advance(steps, ())
    assert silent.fileno() == -1


def test_giving_up_closes_what_was_opened(full: socket.socket) -> None:
    steps = dial_steps(to(full))
    advance(steps)
    (silent,) = opened(steps).values()
    steps.close()
    assert silent.fileno() == -1


def test_work_that_fails_in_between_ends_the_dial() -> None:
    def fail() -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    closed: list[bool] = []

    def steps() -> Iterator[Call | Wait]:
        try:
            yield Call(fail)
        finally:
            closed.append(True)

    made: Any = steps()
    with pytest.raises(socket.gaierror):
        advance(made)
    assert closed == [True]


def test_a_unix_socket_with_a_full_backlog_is_not_taken_for_connected(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(path)
        server.listen(0)
        error = 0
        while not error:
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            error = waiting.connect_ex(path)
        with pytest.raises(BlockingIOError):
            dial_blocking(BrokerAddress(unix_path=path), 10)
