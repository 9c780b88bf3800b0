"""Output of the commands: records for programs, lines for people, errors with a remedy.

Results go to standard output, everything else to standard error. With ``--json`` both
carry one JSON object per line, each with a ``type``. rich is imported only where something
is drawn, so that help and shell completion stay quick.

Peers choose topics and payloads, so no control character of theirs reaches the terminal:
it could move the cursor, rename the window or forge a line.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import re
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from pubsub_core.errors import PublishFailed, PubSubError
from pubsub_core.secrets import looks_secret, mask_url

from .exits import exit_code, first_error

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

__all__ = [
    "LineWriter",
    "Output",
    "debugging",
    "escape",
    "explain_error",
    "mask",
    "payload_record",
    "show_error",
    "writing",
]

Record = Mapping[str, Any]

_ASSIGNED = re.compile(r"(?P<name>[A-Za-z_][\w-]*)=(?P<value>[^\s&'\",;)\]}]+)")


def mask(text: str) -> str:
    """Hide credentials of URLs and values of options that are named like secrets.

    The library's own errors hold no secret; this is for the user's own text, which an
    argument parser repeats.
    """
    return _ASSIGNED.sub(
        lambda found: f"{found['name']}=***" if looks_secret(found["name"]) else found[0],
        mask_url(text),
    )


_CONTROLS: Final[dict[int, str]] = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))
} | {
    0x09: "\\t",
    0x0A: "\\n",
    0x0D: "\\r",
    # Line separators, and the marks that reverse the direction of text.
    **{code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F))},
    **{code: f"\\u{code:04x}" for code in range(0x2066, 0x206A)},
}

_JSON_CONTROLS: Final[dict[int, str]] = {
    code: f"\\u{code:04x}"
    for code in (*range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
}


def escape(text: str) -> str:
    """Return *text* on one line, every control character written out."""
    return text.translate(_CONTROLS).encode("utf-8", "backslashreplace").decode()


def payload_record(payload: bytes) -> dict[str, str]:
    """Return the two fields that carry bytes in JSON: text where it is UTF-8, else base64."""
    try:
        return {"payload": payload.decode(), "encoding": "utf-8"}
    except UnicodeDecodeError:
        return {"payload": base64.b64encode(payload).decode(), "encoding": "base64"}


def _fallback(value: object) -> str:
    return str(value)


def _scrub(value: Any) -> Any:
    # Arguments of the process may hold bytes that are no UTF-8 (as lone surrogates), which
    # no JSON text can carry.
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case Mapping():
            return {str(_scrub(key)): _scrub(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]  # any mapping
        case list() | tuple():
            return [_scrub(item) for item in value]  # pyright: ignore[reportUnknownVariableType]  # any sequence
        case _:
            return value


def encode(record: Record) -> str:
    """Return one line of JSON for *record*, safe to show on a terminal."""
    try:
        data = msgspec.json.encode(record, enc_hook=_fallback)
    except (UnicodeEncodeError, TypeError):
        data = msgspec.json.encode(_scrub(record), enc_hook=_fallback)
    return data.decode().translate(_JSON_CONTROLS)


def debugging() -> bool:
    """Whether tracebacks are wanted (``PUBSUB_DEBUG=1``)."""
    return os.environ.get("PUBSUB_DEBUG", "").lower() not in ("", "0", "false", "no")


def explain_error(error: BaseException) -> dict[str, Any]:
    """Return a record of *error*, with the keys that ``--json`` documents."""
    error = first_error(error)
    record: dict[str, Any] = {"type": "error", "code": "internal", "message": "", "hint": ""}
    match error:
        case PubSubError():
            record["code"] = error.code
            record["message"] = error.message
            record["hint"] = error.hint
            if error.backend:
                record["backend"] = error.backend
            if error.topic:
                record["topic"] = error.topic
            if isinstance(error, PublishFailed):
                record["outcome"] = error.outcome.value
        case TimeoutError():
            record["code"] = "timeout"
            record["message"] = str(error) or "a deadline passed"
        case OSError():
            record["code"] = "os"
            name = f": {error.filename}" if error.filename else ""
            record["message"] = f"{error.strerror or error}{name}"
        case _:
            record["message"] = f"{type(error).__name__}: {error}"
            record["hint"] = "this is a fault of the program; PUBSUB_DEBUG=1 shows where"
    record["message"] = mask(str(record["message"]))
    record["hint"] = mask(str(record["hint"]))
    record["exit_code"] = int(exit_code(error))
    return record


def show_error(record: Record, *, as_json: bool) -> None:
    """Print an error made by `explain_error` on standard error."""
    if as_json:
        print(encode(record), file=sys.stderr, flush=True)
        return
    red, plain = ("\x1b[1;31m", "\x1b[0m") if _colours(sys.stderr) else ("", "")
    lines = [f"{red}error:{plain} {escape(record['message'])}"]
    if record["hint"]:
        lines.append(f"  {escape(record['hint'])}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def show_traceback(error: BaseException) -> None:
    """Print where *error* came from, when tracebacks are wanted."""
    if debugging():
        text = "".join(traceback.format_exception(error))
        print(mask(text), file=sys.stderr, end="", flush=True)


def _colours(stream: Any) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


class _LogLines(logging.Handler):
    """Shows warnings of the library as the command shows everything else."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("pubsub") and not debugging():
            return  # debug output of a library beneath us is not for the user
        try:
            text = record.getMessage()
            if record.exc_info and debugging():
                text += "\n" + logging.Formatter().formatException(record.exc_info)
        except Exception:  # noqa: BLE001 - a log line must not end the program
            self.handleError(record)
            return
        self._output.note(text, kind=record.levelname.lower(), logger=record.name)


class Output:
    """Where a command puts its results; ``json`` is the form the user asked for."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self._handler = _LogLines(self)

    def __enter__(self) -> Self:
        root = logging.getLogger()
        root.addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._handler)

    @property
    def colours(self) -> bool:
        """Whether standard output shows colours."""
        return not self.json and _colours(sys.stdout)

    def record(self, record: Record) -> None:
        """Print one JSON object; only when JSON was asked for."""
        if self.json:
            print(encode(record), flush=True)

    def line(self, text: str) -> None:
        """Print one line for people; nothing when JSON was asked for. *text* is escaped."""
        if not self.json:
            print(escape(text), flush=True)

    def note(self, text: str, *, kind: str = "note", **fields: Any) -> None:
        """Say something beside the results, on standard error."""
        if self.quiet and kind in ("note", "status"):
            return
        if self.json:
            record = {"type": "note", "kind": kind, "text": mask(text), **fields}
            print(encode(record), file=sys.stderr, flush=True)
            return
        dim, plain = ("\x1b[2m", "\x1b[0m") if _colours(sys.stderr) else ("", "")
        body = mask(text) if debugging() else escape(mask(text))
        prefix = "" if kind in ("note", "status") else f"{kind}: "
        print(f"{dim}{prefix}{body}{plain}", file=sys.stderr, flush=True)

    def draw(self, *things: RenderableType) -> None:
        """Draw tables and the like for people; nothing when JSON was asked for."""
        if self.json:
            return
        console = self.console()
        for thing in things:
            console.print(thing)

    def console(self, *, stderr: bool = False) -> Console:
        """Return a rich console for the stream."""
        from rich.console import Console  # noqa: PLC0415 - slow to import, rarely needed

        stream = sys.stderr if stderr else sys.stdout
        tty = stream.isatty()
        # Without a terminal there is no width to fit; a table cut to 80 columns loses text.
        width = None if tty or os.environ.get("COLUMNS") else 160
        return Console(
            file=stream,
            width=width,
            force_terminal=True if _colours(stream) else None,
            no_color=not _colours(stream),
            highlight=False,
            soft_wrap=False,
            emoji=False,
        )

    @contextlib.contextmanager
    def progress(
        self, text: str, total: float | None, *, wanted: bool = True
    ) -> Generator[Callable[[float], None], None, None]:
        """Show progress on standard error while the block runs; only on a terminal.

        Yields a function that takes how much is done.
        """
        if not wanted or self.json or self.quiet or not sys.stderr.isatty():
            yield _ignore
            return
        bar = self._bar()
        with bar:
            task = bar.add_task(text, total=total)

            def advance(done: float) -> None:
                bar.update(task, completed=done)

            yield advance

    def _bar(self) -> Progress:
        from rich.progress import (  # noqa: PLC0415 - slow to import, rarely needed
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console(stderr=True),
            transient=True,
        )


def _ignore(_: float) -> None:
    return None


class LineWriter:
    """Writes to standard output from a thread of its own.

    The reader of the output may pause, e.g. a pager; a blocking write on the event loop
    would then stop the keepalives as well. At most `LIMIT` lines wait; after that `write`
    waits, and the subscription's own bounded buffer takes over.
    """

    LIMIT = 1000

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lines: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._room = asyncio.Event()
        self._error: BaseException | None = None
        self._busy = False
        sys.stdout.flush()
        # A daemon: a reader that never comes back must not keep the process alive. It
        # writes to the descriptor, since a thread that dies inside a buffered stream
        # makes the interpreter abort on the way out.
        threading.Thread(target=self._work, name="pubsub-output", daemon=True).start()

    async def write(self, data: bytes) -> None:
        """Queue one piece of output.

        Raises:
            BrokenPipeError: Nobody reads any more.
        """
        with self._changed:
            self._lines.append(data)
            self._changed.notify()
        await self._until(self.LIMIT)

    async def flush(self) -> None:
        """Wait until everything is written."""
        await self._until(0)

    async def _until(self, waiting: int) -> None:
        while True:
            self._room.clear()
            with self._changed:
                if self._error is not None:
                    raise self._error
                if len(self._lines) + self._busy <= waiting:
                    return
            await self._room.wait()

    def _work(self) -> None:
        write = _descriptor_writer()
        while True:
            with self._changed:
                while not self._lines:
                    self._changed.wait()
                data = b"".join(self._lines)
                self._lines.clear()
                self._busy = True
            try:
                write(data)
            except (OSError, ValueError) as exc:
                with self._changed:
                    self._error = exc
            with self._changed:
                self._busy = False
                dead = self._error is not None
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._room.set)
            if dead:
                return


def _descriptor_writer() -> Any:
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):
        stream = sys.stdout.buffer

        def write_stream(data: bytes) -> None:
            stream.write(data)
            stream.flush()

        return write_stream

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    return write


@contextlib.asynccontextmanager
async def writing() -> AsyncGenerator[LineWriter, None]:
    """Give a `LineWriter`, and let it finish when the block ends without an error."""
    writer = LineWriter()
    try:
        yield writer
    except BaseException:
        # Messages that arrived before a Ctrl-C are shown, unless nobody reads them.
        with contextlib.suppress(TimeoutError, OSError, ValueError):
            async with asyncio.timeout(1):
                await writer.flush()
        raise
    await writer.flush()


def table(title: str, columns: Iterable[str]) -> Any:
    """Return an empty rich table in the command's style."""
    from rich import box  # noqa: PLC0415 - slow to import, rarely needed
    from rich.table import Table  # noqa: PLC0415 - as above

    made = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made
