"""``pub`` and ``sub`` between real processes, by way of ``pubsub serve mqtt``."""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from pubsub_mqtt.server import MosquittoServer
from tests.cli.conftest import DEADLINE, Child, Invoke, Spawn, clean_environment, records

Unique = Callable[[str], str]


@pytest.fixture
def url(mosquitto: MosquittoServer) -> str:
    return mosquitto.url


def subscribed(spawn: Spawn, url: str, filter: str, *arguments: str) -> Child:
    """Start ``sub`` and return once the broker has confirmed the subscription."""
    child = spawn("sub", url, filter, *arguments)
    child.until_error(b"subscribed")
    return child


def test_a_message_between_two_processes(
    invoke: Invoke, spawn: Spawn, url: str, unique: Unique
) -> None:
    topic = unique("oven/temp")
    child = subscribed(spawn, url, topic.replace("oven", "{device}"), "--json", "-n", "1")
    sent = invoke("pub", url, topic, "81.5", "--json")
    assert sent.exit_code == 0
    (receipt,) = records(sent.stdout)
    assert receipt["type"] == "receipt"
    assert receipt["topic"] == topic
    assert receipt["confirmed_by"] == "broker"
    message = child.record()
    assert message["type"] == "message"
    assert message["topic"] == topic
    assert message["payload"] == "81.5"
    assert message["encoding"] == "utf-8"
    assert message["params"] == {"device": "oven"}
    assert message["origin"] == "live"
    assert abs(message["time"] - time.time()) < DEADLINE
    assert child.end() == 0


def test_lines_of_standard_input(spawn: Spawn, url: str, unique: Unique) -> None:
    topic = unique("lines")
    receiver = subscribed(spawn, url, topic, "--text")
    sender = spawn("pub", url, topic, "-", stdin=subprocess.PIPE)
    sender.write("one\ntwo ü\r\n".encode())
    # Each line is sent when it is there, not at the end of the input.
    assert receiver.line() == b"one\n"
    assert receiver.line() == "two ü\n".encode()
    sender.write(b"last without end")
    assert sender.process.stdin is not None
    sender.process.stdin.close()
    assert receiver.line() == b"last without end\n"
    assert sender.end() == 0
    assert b"sent 3 messages" in sender.line()
    assert receiver.end(signal.SIGINT) == 130
    assert b"Traceback" not in receiver.stderr


@pytest.mark.slow
def test_many_messages_keep_their_order(
    invoke: Invoke, spawn: Spawn, url: str, unique: Unique
) -> None:
    topic = unique("many")
    receiver = subscribed(spawn, url, topic, "--text", "-n", "1500")
    lines = "".join(f"{number}\n" for number in range(1500))
    assert invoke("pub", url, topic, "-", "--quiet", input=lines).exit_code == 0
    assert [receiver.line() for _ in range(1500)] == [
        f"{number}\n".encode() for number in range(1500)
    ]
    assert receiver.end() == 0


def test_standard_input_is_cut_at_count(
    invoke: Invoke, spawn: Spawn, url: str, unique: Unique
) -> None:
    topic = unique("cut")
    sent = invoke("pub", url, topic, "-", "-n", "2", "--json", input="a\nb\nc\n")
    assert [record["topic"] for record in records(sent.stdout)] == [topic, topic]


@pytest.mark.slow
def test_a_file_travels_as_it_is(
    invoke: Invoke, spawn: Spawn, url: str, unique: Unique, tmp_path: Path
) -> None:
    payload = bytes(range(256))
    (tmp_path / "data.bin").write_bytes(payload)
    topic = unique("file")
    receiver = subscribed(spawn, url, topic, "--json", "-n", "1")
    assert invoke("pub", url, topic, "--file", "missing").exit_code == 2
    assert invoke("pub", url, topic, "--file", "data.bin").exit_code == 0
    message = receiver.record()
    assert message["encoding"] == "base64"
    assert base64.b64decode(message["payload"]) == payload


def test_raw_output_is_the_payload(invoke: Invoke, spawn: Spawn, url: str, unique: Unique) -> None:
    topic = unique("raw")
    receiver = subscribed(spawn, url, topic, "--raw", "-n", "1")
    assert invoke("pub", url, topic, "\x1b[31mred").exit_code == 0
    assert receiver.line() == b"\x1b[31mred\n"


@pytest.mark.slow
def test_text_output_obeys_no_control_character(
    invoke: Invoke, spawn: Spawn, url: str, unique: Unique
) -> None:
    topic = unique("escape")
    for form in ((), ("--text",)):
        receiver = subscribed(spawn, url, topic, *form, "-n", "1")
        assert invoke("pub", url, topic, "\x1b]0;owned\x07\nforged").exit_code == 0
        line = receiver.line()
        assert b"\\x1b]0;owned\\x07\\nforged" in line
        assert b"\x1b" not in line


@pytest.mark.slow
def test_codecs_in_both_directions(invoke: Invoke, spawn: Spawn, url: str, unique: Unique) -> None:
    topic = unique("codec")
    receiver = subscribed(spawn, url, topic, "--codec", "msgpack", "--json", "-n", "2")
    sent = invoke("pub", url, topic, '{"celsius": 81.5}', "--codec", "msgpack")
    assert sent.exit_code == 0, sent.stderr
    message = receiver.record()
    assert message["payload"] == {"celsius": 81.5}
    assert message["encoding"] == "msgpack"
    assert invoke("pub", url, topic, b"\xc1".decode("latin-1"), "--codec", "text").exit_code == 0
    broken = receiver.record()
    assert "decode_error" in broken
    assert broken["encoding"] == "utf-8"


def test_a_payload_that_is_no_json_is_refused_before_anything_is_sent(invoke: Invoke) -> None:
    result = invoke("pub", "memory://", "a", "hello", "--codec", "json")
    assert result.exit_code == 2
    assert "JSON" in result.stderr
    assert "--codec" in result.stderr


@pytest.mark.slow
def test_json_codec_writes_compact_json(
    invoke: Invoke, spawn: Spawn, url: str, unique: Unique
) -> None:
    topic = unique("json")
    receiver = subscribed(spawn, url, topic, "--raw", "-n", "1")
    assert invoke("pub", url, topic, ' {"a" : [1, 2] } ', "--codec", "json").exit_code == 0
    assert msgspec.json.decode(receiver.line()) == {"a": [1, 2]}


@pytest.mark.slow
def test_retained_values_are_marked(invoke: Invoke, spawn: Spawn, url: str, unique: Unique) -> None:
    topic = unique("retained")
    assert invoke("pub", url, topic, "kept", "--retain").exit_code == 0
    message = spawn("sub", url, topic, "--json", "-n", "1").record()
    assert message["origin"] == "retained"
    assert message["payload"] == "kept"
    assert invoke("pub", url, topic, "", "--retain").exit_code == 0


@pytest.mark.slow
def test_headers_ttl_and_content_type(
    invoke: Invoke, spawn: Spawn, url: str, unique: Unique
) -> None:
    topic = unique("headers")
    v5 = ("-o", "protocol=5")
    receiver = subscribed(spawn, url, topic, "--json", "-n", "1", *v5)
    sent = invoke(
        *("pub", url, topic, "x", *v5, "--ttl", "60", "--content-type", "text/plain"),
        *("-H", "site=7", "-H", "site=8", "-H", "empty="),
    )
    assert sent.exit_code == 0, sent.stderr
    message = receiver.record()
    assert message["headers"] == [["site", "7"], ["site", "8"], ["empty", ""]]
    assert message["content_type"] == "text/plain"


def test_what_the_broker_cannot_do_is_code_4(invoke: Invoke, url: str, unique: Unique) -> None:
    result = invoke("pub", url, unique("x"), "-H", "a=b", "-o", "protocol=3.1.1", "--json")
    assert result.exit_code == 4
    (error,) = records(result.stderr)
    assert error["code"] == "not_supported"
    assert error["hint"]
    assert error["backend"] == "mqtt"


def test_presence_on_plain_mqtt_is_code_4(invoke: Invoke, url: str, unique: Unique) -> None:
    for command in ("presence", "notifications"):
        result = invoke(command, url, unique("x"), "--json")
        assert result.exit_code == 4
        (error,) = records(result.stderr)
        assert "memory" in error["hint"]


def test_a_deadline_before_count_is_code_5(spawn: Spawn, url: str, unique: Unique) -> None:
    child = spawn("sub", url, unique("silent"), "-n", "1", "--exit-after", "0.2")
    assert child.end() == 5
    assert child.rest() == []


def test_exit_after_alone_is_success(spawn: Spawn, url: str, unique: Unique) -> None:
    assert spawn("sub", url, unique("silent"), "--exit-after", "0.2").end() == 0


def test_an_unreachable_broker_is_code_3(invoke: Invoke) -> None:
    result = invoke("pub", "mqtt://127.0.0.1:1", "a", "b", "--json")
    assert result.exit_code == 3
    (error,) = records(result.stderr)
    assert error["hint"]


def test_wrong_credentials_are_code_3_and_not_shown(
    invoke: Invoke, mosquitto_users: MosquittoServer
) -> None:
    where = mosquitto_users.url.replace("//", "//alice:canary-7@")
    result = invoke("sub", where, "open/#", PUBSUB_DEBUG="1")
    assert result.exit_code == 3
    assert "canary-7" not in result.output


def test_a_refused_publish_is_code_1(invoke: Invoke, mosquitto_users: MosquittoServer) -> None:
    where = mosquitto_users.url.replace("//", "//bob:b@")
    result = invoke("pub", where, "open/x", "1", "-o", "protocol=5", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    (error,) = records(result.stderr)
    assert error["code"] == "not_authorized"
    assert error["outcome"] == "rejected"
    assert error["topic"] == "open/x"
    assert error["hint"]


def test_lines_before_a_bad_one_are_sent(
    invoke: Invoke, spawn: Spawn, url: str, unique: Unique
) -> None:
    topic = unique("bad")
    receiver = subscribed(spawn, url, topic, "--text", "-n", "2")
    result = invoke(
        "pub", url, topic, "-", "--codec", "json", "--json", input="1\nnull\nnot json\n4\n"
    )
    assert result.exit_code == 1
    assert len(records(result.stdout)) == 2
    (error,) = records(result.stderr)
    assert "line 3" in error["message"]
    assert "2 were sent" in error["message"]
    assert [receiver.line(), receiver.line()] == [b"1\n", b"null\n"]


@pytest.mark.parametrize("redirection", ["<&-", "0>written"])
@pytest.mark.parametrize("source", ["-", "--file -"])
def test_standard_input_that_cannot_be_read_is_an_error(
    source: str, redirection: str, tmp_path: Path
) -> None:
    command = f'"$0" -m pubsub_core.cli pub memory:// a {source} {redirection}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable],
        capture_output=True,
        timeout=DEADLINE,
        check=False,
        cwd=tmp_path,
        env=clean_environment(),
    )
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"Bad file descriptor" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_subscription_cleanly(
    spawn: Spawn, url: str, unique: Unique, number: signal.Signals
) -> None:
    child = subscribed(spawn, url, unique("x"))
    assert child.end(number) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert b"Traceback" not in child.stderr
    assert b"error" not in child.stderr


@pytest.mark.slow
def test_ctrl_c_while_waiting_for_standard_input(spawn: Spawn, url: str, unique: Unique) -> None:
    topic = unique("stdin")
    receiver = subscribed(spawn, url, topic, "--text")
    sender = spawn("pub", url, topic, "-", stdin=subprocess.PIPE)
    sender.write(b"first\n")
    assert receiver.line() == b"first\n"
    assert sender.end(signal.SIGINT) == 130
    assert b"Traceback" not in sender.stderr
    assert b"Fatal" not in sender.stderr


@pytest.mark.slow
def test_ctrl_c_while_connecting(spawn: Spawn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        child = spawn("sub", f"mqtt://127.0.0.1:{port}", "a")
        silent.settimeout(DEADLINE)
        accepted, _ = silent.accept()
        with accepted:
            assert child.end(signal.SIGINT) == 130
            assert b"Traceback" not in child.stderr


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_command(invoke: Invoke, url: str, unique: Unique) -> None:
    topic = unique("pipe")
    reader, writer = os.pipe()
    os.close(reader)
    other = subprocess.Popen(
        [sys.executable, "-m", "pubsub_core.cli", "sub", url, topic, "--text"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=clean_environment(),
    )
    os.close(writer)
    assert other.stderr is not None
    try:
        assert b"subscribed" in other.stderr.readline()
        assert invoke("pub", url, topic, "x").exit_code == 0
        # The write fails in its thread; the next message finds out.
        assert invoke("pub", url, topic, "y").exit_code == 0
        assert other.wait(DEADLINE) == 141
        assert b"Traceback" not in other.stderr.read()
    finally:
        other.kill()
        other.wait(DEADLINE)
        other.stderr.close()


@pytest.mark.slow
def test_a_reader_that_pauses_does_not_stop_the_keepalive(
    tmp_path: Path, invoke: Invoke, url: str, unique: Unique
) -> None:
    topic = unique("paused")
    (tmp_path / "big").write_bytes(b"x" * 100_000)
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "pubsub_core.cli", "sub", url, topic, "--raw", "-o", "keepalive=1"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=clean_environment(),
    )
    os.close(writer)
    assert child.stderr is not None
    try:
        assert b"subscribed" in child.stderr.readline()
        # More than a pipe holds: the command's writer is stuck from here on.
        for _ in range(3):
            assert invoke("pub", url, topic, "--file", "big").exit_code == 0
        # Mosquitto drops a client that is silent for 1.5 times its keepalive. While its output
        # is stuck ours must stay; that nothing happens can only be seen by waiting for it.
        ready, _, _ = select.select([child.stderr], [], [], 3.0)
        assert ready == [], child.stderr.readline()
        got = 0
        while got < 300_003:
            got += len(os.read(reader, 65536))
        child.send_signal(signal.SIGINT)
        assert child.wait(DEADLINE) == 130
        assert b"lost" not in child.stderr.read()
    finally:
        os.close(reader)
        child.kill()
        child.wait(DEADLINE)
        child.stderr.close()


@pytest.mark.slow
def test_a_lost_connection_is_told_and_survived(
    spawn: Spawn, invoke: Invoke, unique: Unique
) -> None:
    server = spawn("serve", "mqtt", "--json")
    ready = server.record()
    topic = unique("again")
    child = subscribed(spawn, ready["url"], topic, "--json")
    assert server.end(signal.SIGTERM) == 0
    child.until_error(b'"status":"reconnecting"')
    spawn("serve", "mqtt", "--json", "--port", str(ready["port"])).record()
    child.until_error(b'"status":"online"')
    assert invoke("pub", ready["url"], topic, "back").exit_code == 0
    seen = [child.record(), child.record()]
    assert [record["type"] for record in seen] == ["gap", "message"]
    assert seen[0]["reason"] == "disconnected"
    assert seen[0]["recovered"] is False
    assert seen[1]["payload"] == "back"
    assert child.end(signal.SIGINT) == 130


@pytest.mark.slow
def test_share_groups_split_the_messages(
    invoke: Invoke, spawn: Spawn, url: str, unique: Unique
) -> None:
    topic = unique("jobs")
    workers = [subscribed(spawn, url, topic, "--text", "--group", "w") for _ in range(2)]
    lines = "".join(f"{number}\n" for number in range(20))
    assert invoke("pub", url, topic, "-", input=lines).exit_code == 0
    deadline = time.monotonic() + DEADLINE
    # A last message on the same topic would go to one of them only: count instead.
    got: list[bytes] = []
    while len(got) < 20 and time.monotonic() < deadline:
        for worker in workers:
            while not worker._lines.empty():
                line = worker._lines.get()
                assert line is not None
                got.append(line)
        time.sleep(0.01)
    assert sorted(int(line) for line in got) == list(range(20))
    for worker in workers:
        worker.end(signal.SIGINT)


def test_rate_spreads_the_messages(invoke: Invoke, url: str, unique: Unique) -> None:
    start = time.monotonic()
    result = invoke("pub", url, unique("rate"), "x", "-n", "5", "--rate", "20", "--json")
    assert len(records(result.stdout)) == 5
    assert time.monotonic() - start >= 0.2


def test_a_payload_and_a_file_are_one_too_many(invoke: Invoke) -> None:
    result = invoke("pub", "memory://", "a", "x", "--file", "y")
    assert result.exit_code == 2


def test_one_output_form_only(invoke: Invoke) -> None:
    assert invoke("sub", "memory://", "a", "--raw", "--json").exit_code == 2


def test_named_buses_and_profiles(invoke: Invoke, url: str, unique: Unique, tmp_path: Path) -> None:
    (tmp_path / "pubsub.toml").write_text(
        f'[bus.main]\nurl = "{url}"\n[profile.test.bus.main]\nurl = "memory://"\n'
    )
    real = json.loads(invoke("pub", "main", unique("x"), "1", "--json").stdout)
    assert real["confirmed_by"] == "broker"
    asked = records(invoke("--profile", "test", "caps", "main", "--json").stdout)
    assert {record["backend"] for record in asked} == {"memory"}
    elsewhere = tmp_path / "elsewhere.toml"
    elsewhere.write_text('[bus.other]\nurl = "memory://"\n')
    assert invoke("--config", str(elsewhere), "pub", "other", "a", "b").exit_code == 0
    missing = invoke("--config", str(elsewhere), "pub", "main", "a", "b")
    assert missing.exit_code == 2
    assert "other" in missing.stderr
