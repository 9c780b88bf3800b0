from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import typer

from pubsub_core.cli.exits import MEANINGS
from pubsub_core.errors import NotConnected
from pubsub_core.hookspecs import hookimpl
from pubsub_core.plugins import Registry, registry, use_registry
from tests.cli.conftest import Invoke, Spawn, clean_environment, records

COMMANDS = [
    "demo",
    "pub",
    "sub",
    "presence",
    "notifications",
    "history",
    "caps",
    "plugins",
    "config",
    "doctor",
    "serve",
    "bench",
]


def test_help_lists_every_command_and_exit_code(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for word in COMMANDS:
        assert f" {word} " in result.output
    plain = " ".join(result.output.split())
    for code, meaning in MEANINGS.items():
        assert f"{code.value} {meaning}" in plain


@pytest.mark.parametrize("command", [*COMMANDS, "config explain", "config lint", "config schema"])
def test_every_command_has_help_and_json(invoke: Invoke, command: str) -> None:
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    if command != "config":
        assert "--json" in result.output


def test_without_a_command_help_is_shown(invoke: Invoke) -> None:
    result = invoke()
    assert "Usage" in result.output
    assert result.exit_code in (0, 2)


def test_version(invoke: Invoke) -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("pubsub-core ")


def test_wrong_arguments_are_one_error_with_a_remedy(invoke: Invoke) -> None:
    result = invoke("pub", "memory://", "--no-such-option")
    assert result.exit_code == 2
    assert result.stdout == ""
    error, remedy = result.stderr.splitlines()
    assert error.startswith("error: no such option")
    assert "pubsub pub --help" in remedy


def test_wrong_arguments_as_json(invoke: Invoke) -> None:
    result = invoke("sub", "--json")
    assert result.exit_code == 2
    (error,) = records(result.stderr)
    assert error["type"] == "error"
    assert error["code"] == "usage"
    assert error["exit_code"] == 2
    assert "BUS" in error["message"]
    assert error["hint"]


def test_an_unknown_command_suggests_the_nearest(invoke: Invoke) -> None:
    result = invoke("notification")
    assert result.exit_code == 2
    assert "notifications" in result.stderr


def test_an_unknown_backend_is_an_error_with_what_is_installed(invoke: Invoke) -> None:
    result = invoke("pub", "nosuch://x", "a", "--json")
    assert result.exit_code == 2
    (error,) = records(result.stderr)
    assert error["code"] == "unknown_backend"
    assert "memory" in error["hint"]


def test_a_bad_topic_names_level_and_character(invoke: Invoke) -> None:
    result = invoke("pub", "memory://", "lab/+/temp", "x")
    assert result.exit_code == 2
    assert "+" in result.stderr
    assert "Traceback" not in result.stderr


def test_secrets_in_arguments_are_not_printed(invoke: Invoke) -> None:
    for arguments in (
        ("pub", "nosuch://bob:canary-7@host", "a"),
        ("doctor", "nosuch://bob:canary-7@host"),
        ("pub", "memory://", "a", "b", "mqtt://bob:canary-7@host"),
        ("pub", "memory://", "a", "-o", "passwort=canary-7", "-o", "token=canary-7"),
        ("caps", "mqtt://bob:canary-7@host?nonsense=1"),
    ):
        for form in ((), ("--json",)):
            result = invoke(*arguments, *form, PUBSUB_DEBUG="1")
            assert result.exit_code != 0
            assert "canary-7" not in result.output, arguments


def test_tracebacks_only_when_asked_for(invoke: Invoke) -> None:
    quiet = invoke("pub", "nosuch://x", "a")
    loud = invoke("pub", "nosuch://x", "a", PUBSUB_DEBUG="1")
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert "error: " in loud.stderr
    assert quiet.exit_code == loud.exit_code == 2


def test_completion_script_for_shells(spawn: Spawn) -> None:
    child = spawn("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert child.end() == 0
    assert b"_PUBSUB_COMPLETE" in b"".join(child.rest())


def test_completion_of_commands_and_backends() -> None:
    def complete(words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", "from pubsub_core.cli import main; main()"],
            env=clean_environment(
                _PUBSUB_COMPLETE="complete_bash",
                COMP_WORDS=words,
                COMP_CWORD=str(len(words.split(" ")) - 1),
            ),
            capture_output=True,
            timeout=30,
            check=False,
        )
        return done.stdout.decode().split()

    assert {"pub", "presence", "plugins"} <= set(complete("pubsub p"))
    assert "mqtt" in complete("pubsub serve m")


def test_the_library_does_not_import_the_command_line() -> None:
    code = (
        "import sys, json, pubsub_core; print(json.dumps([name for name in "
        "('typer', 'rich', 'click', 'paho', 'amqtt', 'wsproto', 'pubsub_core.cli')"
        " if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=True)
    assert json.loads(done.stdout) == []


def test_the_command_does_not_import_what_it_does_not_need() -> None:
    code = (
        "import sys, json; from pubsub_core.cli.root import build; build();"
        "print(json.dumps([name for name in ('paho', 'amqtt', 'rich.table', 'click')"
        " if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=True)
    assert json.loads(done.stdout) == []


def test_help_imports_no_client_and_no_server() -> None:
    """Which would make each command, and each press of the completion key, slow."""
    code = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from pubsub_core.cli import main; sys.argv = ['pubsub', '--help']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env=clean_environment(),
    )
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "typer" in loaded
    assert not loaded & {"paho", "amqtt", "wsproto", "pydantic"}


class WithCommand:
    """A plugin that adds a command and lets it fail in two ways."""

    @hookimpl
    def pubsub_commands(self, cli: typer.Typer) -> None:
        @cli.command("greet")
        def greet(name: str, json: bool = False) -> None:  # pyright: ignore[reportUnusedFunction]
            if name == "nobody":
                raise NotConnected("nobody is there", hint="come back later")
            if name == "bug":
                raise RuntimeError("a fault")
            print(f"hello {name}")


class BrokenCommand:
    @hookimpl
    def pubsub_commands(self, cli: Any) -> None:
        raise RuntimeError("this plugin is broken")


def test_a_plugin_adds_a_command(invoke: Invoke) -> None:
    with use_registry(Registry.from_plugins({"greeter": WithCommand()})):
        assert invoke("greet", "you").stdout == "hello you\n"
        failed = invoke("greet", "nobody", "--json")
        assert failed.exit_code == 3
        assert records(failed.stderr)[0]["hint"] == "come back later"
        fault = invoke("greet", "bug")
        assert fault.exit_code == 1
        assert "Traceback" not in fault.stderr
        assert "greet" in invoke("--help").output


def test_a_plugin_whose_command_fails_harms_nobody(invoke: Invoke) -> None:
    plugins = {"broken": BrokenCommand(), "greeter": WithCommand()}
    with use_registry(Registry.from_plugins(plugins)):
        assert invoke("greet", "you").exit_code == 0
        listed = records(invoke("plugins", "--json").stdout)
        (failure,) = [record for record in listed if record["type"] == "failure"]
        assert failure["plugin"] == "broken"
        assert "this plugin is broken" in failure["message"]
        assert invoke("plugins", "--strict").exit_code == 1


def test_strict_plugins_end_the_command(spawn: Spawn) -> None:
    child = spawn("caps", "--json", PUBSUB_PLUGINS="memory,absent", PUBSUB_STRICT_PLUGINS="1")
    assert child.end() == 2
    (error,) = records(child.stderr.decode())
    assert error["code"] == "plugin"
    assert "absent" in error["message"]


def test_plugins_lists_what_is_installed(invoke: Invoke) -> None:
    found = {record["name"]: record for record in records(invoke("plugins", "--json").stdout)}
    mqtt = found["mqtt"]
    assert mqtt["status"] == "loaded"
    assert mqtt["distribution"] == "pubsub-core"
    (backend,) = mqtt["backends"]
    assert "mqtts" in backend["schemes"]
    assert "wildcards" in backend["capabilities"]
    assert backend["dev_server"] is True
    table = invoke("plugins").stdout
    assert "mqtts" in table
    assert mqtt["version"] in table


def test_a_plugin_that_fails_is_listed_with_its_cause(invoke: Invoke) -> None:
    class Refused:
        @hookimpl
        def pubsub_backends(self) -> Any:
            raise ImportError("no module named 'acme'")

    with use_registry(Registry.from_plugins({"acme": Refused()})):
        (record,) = records(invoke("plugins", "--json").stdout)
        assert record["status"] == "failed"
        assert "acme" in record["error"]["message"]
        assert "no module named" in record["error"]["cause"]
        shown = invoke("plugins")
        assert "no module named" in shown.stdout
        assert shown.exit_code == 0
        asked = invoke("pub", "acme://x", "a")
        assert asked.exit_code == 2
        assert "no module named" in asked.stderr


def test_caps_shows_what_every_backend_declares(invoke: Invoke) -> None:
    found = records(invoke("caps", "--json").stdout)
    for info in registry().infos:
        mine = [record for record in found if record["backend"] == info.name]
        assert {"capability", "guarantees", "limits"} == {record["type"] for record in mine}
        for record in mine:
            if record["type"] == "capability" and record["level"] == "none":
                assert record["why"], record
    table = invoke("caps").stdout
    assert "wildcards" in table
    assert "mqtt" in table
    assert "memory" in table


def test_caps_asks_a_bus_and_gives_reasons(invoke: Invoke) -> None:
    result = invoke("caps", "memory://", "--json")
    assert result.exit_code == 0
    found = {
        record["capability"]: record
        for record in records(result.stdout)
        if record["type"] == "capability"
    }
    assert found["history"]["level"] == "native"
    assert found["history"]["bus"]
    shown = invoke("caps", "memory://").stdout
    assert "guarantees" in shown
    assert "limits" in shown
