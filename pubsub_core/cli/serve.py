"""``pubsub serve``: an embedded server for development, on loopback unless told otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import inspect
import ipaddress
import signal
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
import typer

from pubsub_core.errors import BadOption, ConfigError, PubSubError
from pubsub_core.interfaces import BackendInfo, DevServer
from pubsub_core.plugins import registry

from .exits import ExitCode
from .options import BackendArgument, JsonOption, pairs
from .output import Output, encode, escape, explain_error, show_error, show_traceback

__all__ = ["make_server", "serve"]

_OWN: Final = ("host", "port")


def serve(
    context: typer.Context,
    name: BackendArgument,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="0 takes a free port.")
    ] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="KEY=VALUE",
            help="An option of that server; --KEY VALUE is the same. May be repeated.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Run the embedded server of a backend until Ctrl-C or SIGTERM.

    One line on standard output says that it is ready, and where. Options that are not listed
    here go to the server of that backend, e.g. --store FILE.
    """
    with Output(json=json) as output:
        given = {**pairs(option, option="--option"), **_flags(context.args)}
        server = make_server(registry().by_name(name), host, port, given)
        if not _loopback(host):
            output.note(
                f"listening on {host}: this server is for development, not for the open network",
                kind="warning",
            )
        # Not the shared runner: here both signals are the expected way to stop.
        code = asyncio.run(_serve(output, server))
        if code:
            raise typer.Exit(code)


def make_server(
    info: BackendInfo, host: str, port: int, options: Mapping[str, str] | None = None
) -> DevServer:
    """Return the embedded server of a backend, not started.

    Raises:
        NotSupported: It has none.
        BadOption: An option does not fit its constructor.
    """
    factory = registry().load_dev_server(info)
    given = _coerce(factory, options or {}, info.name)
    return factory(host=host, port=port, **given)


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    """Read ``--key value`` and ``--key=value``; a bare ``--key`` is true, ``--no-key`` false."""
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            # The word may be a secret whose option was forgotten.
            raise typer.BadParameter(
                "an argument that belongs to no option", param_hint="after the backend's name"
            )
        key, equals, value = word[2:].partition("=")
        if not equals:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            else:
                value = "false" if key.startswith("no-") else "true"
                key = key.removeprefix("no-")
        if key in found:
            raise typer.BadParameter("given twice", param_hint=f"--{key}")
        found[key] = value
    return found


def _coerce(factory: Any, options: Mapping[str, str], backend: str) -> dict[str, Any]:
    """Convert texts to the types of the constructor's annotations."""
    parameters = {
        parameter.name: parameter
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.name not in _OWN and parameter.kind is parameter.KEYWORD_ONLY
    }
    hints: dict[str, Any] = {}
    with contextlib.suppress(NameError):  # a type imported for checkers only
        hints = typing.get_type_hints(factory.__init__)
    found: dict[str, Any] = {}
    for key, text in options.items():
        option = key.replace("-", "_")
        if option not in parameters:
            near = difflib.get_close_matches(option, parameters, n=1)
            known = ", ".join(parameters) or "none"
            raise BadOption(
                f"the {backend} server has no option {key!r}",
                option=f"--{key}",
                hint=f"did you mean {near[0]!r}?" if near else f"it has: {known}",
                backend=backend,
            )
        try:
            found[option] = msgspec.convert(text, hints.get(option, str), strict=False)
        except msgspec.ValidationError as exc:
            raise BadOption(
                f"option {key!r} of the {backend} server: {exc}",
                option=f"--{key}",
                hint="write the value as that type",
                backend=backend,
            ) from exc
        except TypeError:
            found[option] = text  # an annotation that msgspec does not know
    return found


async def _serve(output: Output, server: DevServer) -> ExitCode:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Before start(): a signal while it starts must not leave a child behind.
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            loop.add_signal_handler(number, stop.set)
    starting = asyncio.create_task(server.start(), name="pubsub-serve")
    stopping = asyncio.create_task(stop.wait(), name="pubsub-stop")
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return ExitCode.OK
        starting.result()
        _ready(output, server)
        await stopping
    except (PubSubError, OSError) as exc:
        # A server that cannot listen is a failed operation, not a failed connection.
        show_traceback(exc)
        record = explain_error(exc)
        if not isinstance(exc, ConfigError):
            record["exit_code"] = int(ExitCode.FAILED)
        if not record["hint"]:
            record["hint"] = "choose another --host or --port; --port 0 takes a free one"
        show_error(record, as_json=output.json)
        return ExitCode(record["exit_code"])
    finally:
        stopping.cancel()
        # A second signal ends the process at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                loop.remove_signal_handler(number)
        await server.stop()
    return ExitCode.OK


def _ready(output: Output, server: DevServer) -> None:
    described = dict(server.describe())
    if output.json:
        own = {
            "type": "ready",
            "backend": server.backend,
            "url": server.url,
            "host": server.host,
            "port": server.port,
        }
        record = {**own, **{key: value for key, value in described.items() if key not in own}}
        # Not masked: credentials that a server made itself are told here and nowhere else.
        print(encode(record), flush=True)
        return
    more = "; ".join(
        f"{key}: {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]  # whatever the server tells
        for key, value in described.items()
    )
    print(
        f"{server.backend} ready on {server.url}" + (f" ({escape(more)})" if more else ""),
        flush=True,
    )


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
