"""The root of the command: its options, its sub-commands, and one place where errors end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from pubsub_core.errors import PubSubError
from pubsub_core.plugins import registry

from . import (
    bench,
    caps,
    config,
    demo,
    doctor,
    history,
    notifications,
    plugins,
    presence,
    pub,
    serve,
    sub,
)
from .exits import MEANINGS, ExitCode, exit_code
from .options import Settings
from .output import explain_error, show_error, show_traceback

__all__ = ["build", "main"]

# Typer's error for wrong arguments: newer versions bring the class themselves, older ones
# have it from click, so it is found by way of the one that typer always exports.
_UsageError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


class Root(TyperGroup):
    """Runs a command and turns errors into a message and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run, and end the process with one of `ExitCode`."""
        words = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
        code: object = 0
        try:
            code = super().main(
                args=words,
                prog_name="pubsub",
                complete_var=complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
            sys.stdout.flush()
        except _UsageError as exc:
            # Without a command typer has shown the help already.
            if type(exc).__name__ != "NoArgsIsHelpError":
                show_error(_usage(exc), as_json=as_json)
            code = ExitCode.USAGE
        except (KeyboardInterrupt, typer.Abort):
            code = ExitCode.INTERRUPTED
        except BrokenPipeError:
            code = _forget_stdout()
        except Exception as exc:  # noqa: BLE001 - the one place where every error ends
            record = explain_error(exc)
            show_traceback(exc)
            show_error(record, as_json=as_json)
            code = record["exit_code"]
        sys.exit(int(code) if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Invoke the command; a vanished reader is not left to typer, which says 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit(_forget_stdout()) from None


def _forget_stdout() -> ExitCode:
    # The interpreter flushes standard output on the way out and would complain again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.PIPE


def _usage(error: Exception) -> dict[str, Any]:
    formatted = getattr(error, "format_message", lambda: str(error))()
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "pubsub"
    record = explain_error(ValueError(formatted))
    message = record["message"].removeprefix("ValueError: ").rstrip(".")
    return record | {
        "code": "usage",
        "message": message[:1].lower() + message[1:],
        "hint": f"`{command} --help` lists its arguments",
        "exit_code": int(ExitCode.USAGE),
    }


def _epilog() -> str:
    codes = [f"[bold]{code.value}[/bold] {meaning}" for code, meaning in MEANINGS.items()]
    return "\n".join(
        [
            "[bold]Exit codes[/bold]",
            *codes,
            "",
            "PUBSUB_CONFIG and PUBSUB_PROFILE stand for --config and --profile.",
            "PUBSUB_DEBUG=1 shows tracebacks.",
        ]
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pubsub-core {version('pubsub-core')}")
        raise typer.Exit


def build() -> typer.Typer:
    """Return the command with the sub-commands of every plugin.

    Raises:
        PluginError: A plugin failed and ``PUBSUB_STRICT_PLUGINS`` is set.
    """
    cli = typer.Typer(
        name="pubsub",
        cls=Root,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
        epilog=_epilog(),
    )
    cli.command("demo")(demo.demo)
    cli.command("pub")(pub.pub)
    cli.command("sub")(sub.sub)
    cli.command("presence")(presence.presence)
    cli.command("notifications")(notifications.notifications)
    cli.command("history")(history.history)
    cli.command("caps")(caps.caps)
    cli.command("plugins")(plugins.plugins)
    cli.add_typer(config.config, name="config")
    cli.command("doctor")(doctor.doctor)
    # Options unknown to the command belong to the server of that backend.
    unknown = {"allow_extra_args": True, "ignore_unknown_options": True}
    cli.command("serve", context_settings=unknown)(serve.serve)
    cli.command("bench")(bench.bench)
    failures = registry().add_commands(cli)

    @cli.callback()
    def start(  # pyright: ignore[reportUnusedFunction]  # typer calls it
        context: typer.Context,
        config: Annotated[
            Path | None,
            typer.Option(
                "--config", metavar="FILE", help="The pubsub.toml to read.", show_default=False
            ),
        ] = None,
        profile: Annotated[
            str | None,
            typer.Option("--profile", metavar="NAME", help="A profile in it.", show_default=False),
        ] = None,
        _version: Annotated[
            bool,
            typer.Option(
                "--version",
                callback=_show_version,
                is_eager=True,
                help="Print the version.",
                show_default=False,
            ),
        ] = False,
    ) -> None:
        """Publish and subscribe on any broker.

        BUS is a name in pubsub.toml or a URL. Start with [bold]pubsub demo[/bold].
        """
        context.obj = Settings(config, profile, failures)

    return cli


def main() -> NoReturn:
    """Run the ``pubsub`` command and end the process."""
    try:
        cli = build()
    except PubSubError as exc:  # PUBSUB_STRICT_PLUGINS
        show_error(explain_error(exc), as_json="--json" in sys.argv)
        sys.exit(int(exit_code(exc)))
    cli()
    raise AssertionError("the root command ends the process itself")
