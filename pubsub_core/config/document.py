"""The file: finding it, reading it, its shape, and TOML in the text of a variable."""

from __future__ import annotations

import contextlib
import re
import sys
import tomllib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from pubsub_core.errors import BadOption, ConfigError

from .options import unknown_option

__all__ = [
    "FILE_NAME",
    "Document",
    "file_mode",
    "find",
    "inline_table",
    "is_list",
    "is_name",
    "is_table",
    "located",
    "read",
    "reference_in_text",
    "scopes",
    "structure",
]

FILE_NAME = "pubsub.toml"
_TOP = ("bus", "profile")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
# How an error begins that is about a key in the file.
_KEYS_IN_FILE = ("bus.", "bus ", "profile.", "profile ", "[")


@dataclass(slots=True)
class Document:
    """A file that was read, or data in its place."""

    path: Path | None
    data: Mapping[str, Any] = field(repr=False)
    looked: tuple[Path, ...] = ()
    """Where a file was looked for, when there is none."""

    @property
    def file(self) -> str:
        """Its path as a text, or ``""``."""
        return str(self.path) if self.path else ""

    @property
    def told(self) -> str:
        """The end of a sentence that says where something was looked for."""
        if self.path:
            return f" in {self.path}"
        if self.looked:
            return f"; no {FILE_NAME} at {', '.join(map(str, self.looked))}"
        return ""

    def table(self, *keys: str) -> Mapping[str, Any]:
        """Return a nested table; an empty one where there is none."""
        found: Any = self.data
        for key in keys:
            found = found.get(key) if is_table(found) else None
        return found if is_table(found) else {}


def is_name(text: str) -> bool:
    """Whether a bus may be called so."""
    return _NAME.fullmatch(text) is not None


def is_table(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether *value* is a table of TOML."""
    return isinstance(value, Mapping)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether *value* is a list of TOML."""
    return isinstance(value, list)


def find(environ: Mapping[str, str]) -> tuple[Path | None, tuple[Path, ...]]:
    """Return the file to use, and where was looked."""
    named = environ.get("PUBSUB_CONFIG")
    if named:
        return Path(named).expanduser(), ()
    folders: list[Path] = []
    program = sys.argv[0] if sys.argv else ""
    if program not in ("", "-c", "-m"):
        folders.append(Path(program).absolute().parent)
    with contextlib.suppress(FileNotFoundError):  # it was removed
        folders.append(Path.cwd())
    home = environ.get("HOME")
    settings = environ.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else "")
    if settings:
        folders.append(Path(settings) / "pubsub")
    looked = tuple(dict.fromkeys(folder / FILE_NAME for folder in folders))
    for path in looked:
        with contextlib.suppress(OSError):
            if path.is_file():
                return path, looked
    return None, looked


def read(path: Path) -> Document:
    """Read a file.

    Raises:
        ConfigError: It cannot be read, or is no TOML; the text names line and column.
    """
    problem = ""
    text = ""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as exc:
        problem = exc.strerror or type(exc).__name__
    except UnicodeDecodeError as exc:
        problem = f"byte {exc.start} is not UTF-8"
    if problem:
        raise ConfigError(
            f"cannot read {path}: {problem}",
            hint="give the path of a readable file to --config or PUBSUB_CONFIG",
        )
    data: dict[str, Any] = {}
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        problem = str(exc)
    except RecursionError:
        problem = "its tables are nested too deeply"
    if problem:
        # Raised here: the parser's frames hold the text with everything in it.
        where, problem = _position(problem, text)
        raise ConfigError(
            f"{path}{where}: not TOML: {problem}", hint="https://toml.io shows how it is written"
        )
    return Document(path.absolute(), data)


def _position(problem: str, text: str) -> tuple[str, str]:
    """Turn tomllib's words for a place into ``:line:column`` and a sentence."""
    found = re.search(r" \(at line (\d+), column (\d+)\)$", problem)
    if found:
        line, column = int(found[1]), int(found[2])
    elif problem.endswith("(at end of document)"):
        lines = text.rstrip("\n").split("\n")
        line, column = len(lines), len(lines[-1]) + 1
    else:
        return "", problem
    what = problem.rpartition(" (at ")[0]
    return f":{line}:{column}", f"{what} (line {line}, column {column})"


def file_mode(path: Path) -> int:
    """Return the permission bits of a file; 0 when it is not there."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def inline_table(variable: str, text: str) -> Mapping[str, Any]:
    """Read the table that a variable holds.

    Raises:
        ConfigError: It holds none.
    """
    problem = ""
    value: Any = None
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError as exc:
        problem = str(exc).partition(" (at ")[0]
    except RecursionError:
        problem = "it is nested too deeply"
    if problem or not is_table(value):
        because = f": {problem}" if problem else ""
        raise ConfigError(
            f"{variable} is not an inline table{because}",
            hint=f"""write {variable}='{{url = "memory://"}}', or {variable}_URL=memory://""",
        )
    return value


def reference_in_text(text: str) -> Any:
    """Return the reference that *text* writes as an inline table, or *text* itself."""
    if not text.lstrip().startswith("{"):
        return text
    value: Any = None
    with contextlib.suppress(tomllib.TOMLDecodeError, RecursionError):
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    # A password may begin with a brace; it is hardly a table with one of these keys.
    if is_table(value) and any(kind in value for kind in ("env", "file", "command")):
        return value
    return text


# --- structure -------------------------------------------------------------------------


def scopes(name: str, profile: str | None) -> set[str]:
    """Return the parts of the file whose shape a bus depends on; see `structure`."""
    scopes = {"", "bus", f"bus.{name}"}
    if profile:
        scopes |= {f"profile.{profile}", f"profile.{profile}.bus.{name}"}
    return scopes


def structure(document: Document) -> Iterator[tuple[str, BadOption]]:
    """Yield each fault of the file's shape, and the part of the file that it spoils."""
    for key in document.data:
        if key not in _TOP:
            yield "", unknown_option(key, _TOP, place=f"[{key}]", what="table")
    yield from _buses_structure(document.data, "")
    profiles = document.data.get("profile", {})
    if not is_table(profiles):
        yield "", _no_table("profile", "[profile.NAME.bus.NAME]")
        return
    for profile, table in profiles.items():
        place = f"profile.{profile}"
        if not is_table(table):
            yield place, _no_table(place, f"[{place}.bus.NAME]")
            continue
        for key in table:
            if key != "bus":
                yield place, unknown_option(key, ["bus"], place=f"{place}.{key}", what="table")
        yield from _buses_structure(table, f"{place}.")


def _buses_structure(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, BadOption]]:
    buses = table.get("bus", {})
    if not is_table(buses):
        scope = prefix.removesuffix(".") or "bus"
        yield scope, _no_table(f"{prefix}bus", f"[{prefix}bus.NAME]")
        return
    for name, bus in buses.items():
        place = f"{prefix}bus.{name}"
        if not is_table(bus):
            yield place, _no_table(place, f"[{place}]")
        elif not is_name(name):
            yield (
                place,
                BadOption(f"{place}: a bus is named with letters, digits, _ and -", option=place),
            )


def _no_table(place: str, remedy: str) -> BadOption:
    return BadOption(f"{place} must be a table", option=place, hint=f"write {remedy}")


@contextlib.contextmanager
def located(document: Document) -> Generator[None]:
    """Name the file in an error that names a key in it."""
    try:
        yield
    except ConfigError as exc:
        if document.file and exc.message.startswith(_KEYS_IN_FILE):
            exc.message = f"{document.file}: {exc.message}"
            exc.args = (exc.message,)
        raise
