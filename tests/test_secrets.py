"""Secrets stay secret in every textual form, and references fail with a remedy."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_core.errors import BadOption, ConfigError
from pubsub_core.secrets import (
    Reference,
    Secret,
    looks_secret,
    mask_url,
    parse_reference,
    redact,
    resolve_reference,
)
from pubsub_core.testing.stopwatch import Stopwatch

CANARY = "canary-7f3a/9b"


@dataclasses.dataclass(frozen=True)
class Holder:
    password: Secret
    user: str = "tom"


def told(error: BaseException) -> str:
    """Everything that a log or a crash report could show of an error."""
    seen: list[str] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None:
            continue
        seen += [repr(one), str(one), repr(one.args), repr(vars(one))]
        todo += [one.__cause__, one.__context__]
    return "\n".join([*seen, *traceback.format_exception(error)])


@pytest.mark.parametrize(
    "form",
    [
        repr,
        str,
        "{}".format,
        "{:>20}".format,
        "{!r}".format,
        lambda secret: f"{secret}",
        lambda secret: "%s %r" % (secret, secret),  # noqa: UP031 - one more textual form
        lambda secret: repr([secret, {"key": secret}]),
        lambda secret: repr(Holder(secret)),
        lambda secret: str(dataclasses.asdict(Holder(secret))),
        lambda secret: repr(dataclasses.replace(Holder(secret), user="ann")),
        lambda secret: json.dumps(secret, default=str),
        lambda secret: json.dumps({"a": secret}, default=repr),
    ],
)
def test_every_textual_form_is_masked(form: Callable[[Secret], str]) -> None:
    text = form(Secret(CANARY))
    assert CANARY not in text
    assert "***" in text


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_secret_cannot_be_pickled(protocol: int) -> None:
    with pytest.raises(TypeError) as caught:
        pickle.dumps(Holder(Secret(CANARY)), protocol)
    assert CANARY not in told(caught.value)


def test_a_secret_is_no_json() -> None:
    with pytest.raises(TypeError) as caught:
        json.dumps({"password": Secret(CANARY)})
    assert CANARY not in told(caught.value)
    with pytest.raises(TypeError) as refused:
        msgspec.json.encode(Holder(Secret(CANARY)))
    assert CANARY not in told(refused.value)


def test_a_secret_that_is_logged_is_masked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").warning("login with %s %r", Secret(CANARY), Secret(CANARY))
    assert CANARY not in caplog.text
    assert "***" in caplog.text


def test_a_traceback_with_locals_shows_no_secret() -> None:
    def connects(password: Secret) -> None:
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError) as caught:
        connects(Secret(CANARY))
    whole = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    text = "".join(whole.format())
    assert "password = Secret('***')" in text
    assert CANARY not in text


def test_reveal_copy_truth_and_equality() -> None:
    secret = Secret(CANARY)
    assert secret.reveal() == CANARY
    assert copy.deepcopy(secret) is secret
    assert copy.copy(secret) is secret
    assert secret
    assert not Secret("")
    assert secret == Secret(CANARY)
    assert secret != Secret("other")
    assert secret != CANARY
    assert len({secret, Secret(CANARY)}) == 1


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mqtt://tom:pw@h:1883", "mqtt://***@h:1883"),
        ("mqtt://tom@h", "mqtt://***@h"),
        ("mqtt://h:1883?qos=1", "mqtt://h:1883?qos=1"),
        ("mqtt://h?password=pw&qos=1", "mqtt://h?password=***&qos=1"),
        ("mqtt://tom:p/w@h", "mqtt://***@h"),
        ("mqtt://tom:p@w@h", "mqtt://***@h"),
        ("mqtt://a:b@h1,mqtts://c:d@h2", "mqtt://***@h1,mqtts://***@h2"),
        ("lost mqtt+unix://u:p@/run/x, retrying", "lost mqtt+unix://***@/run/x, retrying"),
        ("tom@example.org", "tom@example.org"),
        ("plain words", "plain words"),
        ("", ""),
    ],
)
def test_mask_url(text: str, masked: str) -> None:
    assert mask_url(text) == masked


@given(
    user=st.text(
        st.characters(exclude_categories=["Z", "C"], exclude_characters="<>\"'"), max_size=8
    ),
    host=st.from_regex(r"[a-z]{1,8}", fullmatch=True),
)
def test_mask_url_leaves_nothing_of_the_credentials(user: str, host: str) -> None:
    assert mask_url(f"mqtt://{user}:{CANARY}@{host}/x") == f"mqtt://***@{host}/x"


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "key_password",
        "api_key",
        "access_key",
        "access_secret",
        "auth_token",
        "pwd",
        "key",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name", ["keepalive", "key_file", "username", "qos", "passive", "client_id", "topics", "url"]
)
def test_names_of_other_options(name: str) -> None:
    assert not looks_secret(name)


def test_redact_masks_the_longest_first() -> None:
    text = redact("broker says: bad key abcdef (abc)", [Secret("abc"), "abcdef", None, ""])
    assert text == "broker says: bad key *** (***)"


# --- references ------------------------------------------------------------------------


def resolve(
    value: dict[str, object], folder: Path | None = None, environ: dict[str, str] | None = None
) -> str:
    reference = parse_reference(value, place="bus.main.password")
    return resolve_reference(
        reference, place="bus.main.password", environ=environ or {}, folder=folder
    ).reveal()


def test_environment() -> None:
    assert resolve({"env": "BROKER_PW"}, environ={"BROKER_PW": CANARY}) == CANARY


@pytest.mark.parametrize(
    ("environ", "state"), [({}, "is not set"), ({"BROKER_PW": ""}, "is empty")]
)
def test_a_missing_variable_names_place_and_remedy(environ: dict[str, str], state: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"env": "BROKER_PW"}, environ=environ)
    text = str(caught.value)
    assert f"bus.main.password: environment variable BROKER_PW {state}" in text
    assert "set it" in text


def test_file_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "pw").write_text(CANARY + "\n")
    assert resolve({"file": "pw"}, tmp_path) == CANARY
    assert resolve({"file": str(tmp_path / "pw")}) == CANARY


def test_only_one_newline_is_taken_off(tmp_path: Path) -> None:
    (tmp_path / "pw").write_bytes(b"a \r\n")
    assert resolve({"file": "pw"}, tmp_path) == "a "
    (tmp_path / "pw").write_bytes(b"a\n\n")
    assert resolve({"file": "pw"}, tmp_path) == "a\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        (b"\n", "it is empty"),
        (b"\xff" + CANARY.encode(), "not UTF-8"),
        (CANARY.encode() * 10_000, "larger than"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "pw"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        resolve({"file": "pw"}, tmp_path)
    assert str(path) in str(caught.value)
    assert "bus.main.password" in str(caught.value)
    assert CANARY not in told(caught.value)


def test_command_gets_its_arguments_without_a_shell() -> None:
    script = "import os, sys; print(sys.argv[1] + os.environ['SUFFIX'])"
    command = [sys.executable, "-c", script, "$HOME; echo"]
    assert resolve({"command": command}, environ={"SUFFIX": "!"}) == "$HOME; echo!"


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            f"import sys; print('{CANARY}'); print('{CANARY}', file=sys.stderr); sys.exit(3)",
            "ended with code 3",
        ),
        ("pass", "printed nothing"),
        (f"import sys; sys.stdout.buffer.write(b'\\xff{CANARY}')", "not UTF-8"),
        (f"print('{CANARY}' * 10000)", "printed more than"),
    ],
)
def test_a_failing_command_shows_no_output(
    tmp_path: Path, script: str, problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "give-secret.py"
    program.write_text(script)
    with pytest.raises(ConfigError, match=problem) as caught:
        resolve({"command": [sys.executable, str(program)]})
    assert sys.executable in str(caught.value)
    assert CANARY not in told(caught.value)
    out, err = capfd.readouterr()
    assert CANARY not in out + err


def test_a_command_that_hangs_is_ended() -> None:
    watch = Stopwatch()
    with pytest.raises(ConfigError, match=r"still running after 0\.3 s"):
        resolve({"command": [sys.executable, "-c", "import time; time.sleep(60)"], "timeout": 0.3})
    assert watch.seconds < 10


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="'no-such-program' could not be started: No such file"):
        resolve({"command": ["no-such-program", CANARY]})


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"env": "A", "file": "b"},
        {"env": ""},
        {"env": 5},
        {"env": CANARY},
        {"file": ["x"]},
        {"command": f"echo {CANARY}"},
        {"command": []},
        {"command": [1]},
        {"command": ["x"], "timeout": 0},
        {"command": ["x"], "timeout": "soon"},
        {"command": ["x"], "shell": True},
        {"env": "A", "timeout": 3},
    ],
)
def test_what_is_no_reference(value: dict[str, object]) -> None:
    with pytest.raises(BadOption) as caught:
        parse_reference(value, place="bus.main.password")
    assert str(caught.value).startswith("bus.main.password: ")
    assert caught.value.option == "bus.main.password"
    assert CANARY not in told(caught.value)


def test_other_kinds_go_to_the_plugins() -> None:
    asked: list[tuple[str, str]] = []

    def others(kind: str, ref: str) -> str:
        asked.append((kind, ref))
        return CANARY

    reference = parse_reference({"keyring": "pubsub/edge"}, place="p")
    secret = resolve_reference(reference, place="p", environ={}, others=others)
    assert secret.reveal() == CANARY
    assert asked == [("keyring", "pubsub/edge")]


def test_a_kind_nobody_knows_does_not_show_its_reference() -> None:
    reference = parse_reference({"literal": CANARY}, place="bus.main.password")
    with pytest.raises(ConfigError) as caught:
        resolve_reference(
            reference, place="bus.main.password", environ={}, others=lambda kind, ref: None
        )
    assert "no installed plugin resolves a secret of kind 'literal'" in str(caught.value)
    assert CANARY not in told(caught.value)


def test_a_plugin_that_raises_a_secret_does_not_tell_it() -> None:
    def others(kind: str, ref: str) -> str:
        raise RuntimeError(f"vault said {CANARY}")

    with pytest.raises(ConfigError, match="failed with RuntimeError") as caught:
        resolve_reference(
            Reference("vault", "x"), place="bus.main.password", environ={}, others=others
        )
    assert CANARY not in told(caught.value)


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        (Reference("env", "NAME"), "env NAME"),
        (Reference("file", "/p"), "file /p"),
        (Reference("command", ("vault", "read", CANARY)), "command vault"),
        (Reference("token", CANARY), "token"),
        (Reference("env", CANARY), "env"),
    ],
)
def test_a_reference_tells_no_more_than_it_should(reference: Reference, text: str) -> None:
    assert str(reference) == text
    assert repr(reference) == text
