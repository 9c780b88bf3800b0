from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_core import errors
from pubsub_core.cli.exits import MEANINGS, ExitCode, exit_code, first_error
from pubsub_core.cli.output import encode, escape, explain_error, mask, payload_record


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 2),
        (errors.BadOption("x"), 2),
        (errors.UnknownBackend("x"), 2),
        (errors.MissingDependency("x"), 2),
        (errors.PluginError("x"), 2),
        (errors.InvalidTopic("x"), 2),
        (errors.InvalidFilter("x"), 2),
        (errors.ConnectError("x"), 3),
        (errors.ConnectTimeout("x"), 3),
        (errors.TLSProblem("x"), 3),
        (errors.AuthenticationFailed("x"), 3),
        (errors.ServerRefused("x"), 3),
        (errors.TakenOver("x"), 3),
        (errors.NotConnected("x"), 3),
        (errors.NotSupported("history", why="x"), 4),
        (errors.PublishTimeout("x"), 5),
        (errors.OperationTimeout("x"), 5),
        (TimeoutError(), 5),
        (errors.PublishNotAuthorized("x"), 1),
        (errors.PayloadTooLarge(size=2, limit=1), 1),
        (errors.SubscribeFailed("x"), 1),
        (errors.BusClosed("x"), 1),
        (errors.EncodeFailed("x"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
        (RuntimeError("x"), 1),
    ],
)
def test_each_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_every_error_of_the_library_has_an_exit_code_of_the_table() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type)]
    ours: list[type[errors.PubSubError]] = [
        each for each in kinds if issubclass(each, errors.PubSubError)
    ]
    assert len(ours) > 25
    for kind in ours:
        assert exit_code(kind.__new__(kind)) in MEANINGS


def test_of_several_errors_ours_is_shown() -> None:
    ours = errors.NotConnected("down")
    group = BaseExceptionGroup("both", [ValueError("x"), ExceptionGroup("inner", [ours])])
    assert first_error(group) is ours
    assert explain_error(group)["code"] == "not_connected"


def test_every_exit_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(ExitCode)


def test_control_characters_of_a_peer_are_written_out() -> None:
    assert escape("a\x1b[2Jb\nc\x9bd\u202ee") == "a\\x1b[2Jb\\nc\\x9bd\\u202ee"


@given(st.text(st.characters()))
def test_json_is_one_line_that_no_terminal_obeys_and_reads_back(text: str) -> None:
    line = encode({"type": "x", "text": text})
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", line)
    back = json.loads(line)["text"]
    assert back == text.encode("utf-8", "backslashreplace").decode()


@given(st.binary())
def test_bytes_survive_in_json(payload: bytes) -> None:
    import base64

    record = json.loads(encode(payload_record(payload)))
    if record["encoding"] == "utf-8":
        assert record["payload"].encode() == payload
    else:
        assert base64.b64decode(record["payload"]) == payload


@pytest.mark.parametrize(
    "text",
    [
        "mqtt://bob:canary-7@host/x",
        "got 'mqtt://bob:canary-7@host'",
        "mqtt://host?password=canary-7",
        "-o password=canary-7",
        "auth_token=canary-7 and more",
    ],
)
def test_secrets_are_masked_in_what_the_user_typed(text: str) -> None:
    assert "canary-7" not in mask(text)
    assert "***" in mask(text)


def test_text_without_secrets_stays() -> None:
    assert mask("no option 'keepalve' in mqtt://host:1883/a") == (
        "no option 'keepalve' in mqtt://host:1883/a"
    )


def test_an_error_says_what_became_of_the_message() -> None:
    error = errors.PublishTimeout("late", topic="a/b", backend="mqtt", hint="wait")
    assert explain_error(error) == {
        "type": "error",
        "code": "publish_timeout",
        "message": "late",
        "hint": "wait",
        "backend": "mqtt",
        "topic": "a/b",
        "outcome": "unknown",
        "exit_code": 5,
    }
