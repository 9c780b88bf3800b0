"""Values that must not be printed, and the references they come from.

A `Secret` masks itself in every textual form. A `Reference` says where a secret is kept
(an environment variable, a file, the output of a command, or a kind that a plugin knows) and
is resolved when a bus is built, not when a file is read. `mask_url` and `redact` clean text
that another program wrote.

No error raised here holds a secret: not in its text, not in its cause or context.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from .errors import BadOption, ConfigError

__all__ = [
    "Reference",
    "Secret",
    "looks_secret",
    "mask_url",
    "parse_reference",
    "redact",
    "resolve_reference",
]

_MASK = "***"
_MAX_SECRET_BYTES = 64 * 1024
_COMMAND_TIMEOUT = 10.0


class Secret:
    """A value whose every textual form is ``***``; `reveal` gives the value.

    It cannot be pickled or copied into JSON, compares in constant time only through
    `reveal`, and is true when it is not empty.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value itself. Call it where it goes on the wire, nowhere else."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret({_MASK!r})"

    def __str__(self) -> str:
        return _MASK

    def __format__(self, spec: str) -> str:
        return format(_MASK, spec)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    # A copy within the process gives nothing away, and `dataclasses.asdict` needs it.
    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled; pass a reference to it instead")

    def __getstate__(self) -> Any:
        raise TypeError("a Secret cannot be copied out; pass a reference to it instead")


# --- masking ---------------------------------------------------------------------------

# Everything between "://" and the last "@" that can belong to the same URL. A "/" in a
# password that was not percent-encoded must not save the text before the "@", so this
# rather masks too much. A failover list is cut where the next URL begins.
_CREDENTIALS = re.compile(
    r"""([A-Za-z][A-Za-z0-9+.-]*://)            # scheme
        (?:(?![,;\s][A-Za-z][A-Za-z0-9+.-]*://)[^\s"'<>])*@""",
    re.VERBOSE,
)
_QUERY = re.compile(r"([?&])([^=&\s\"'<>]+)=([^&#\s\"'<>]*)")
_SECRET_NAME = re.compile(
    r"pass(word|wd|phrase)?($|[_-])|pwd|secret|token|credential|(^|[_-])(api|access|private)?_?key($|s$|[_-](?!file|path|id))",
    re.IGNORECASE,
)


def looks_secret(name: str) -> bool:
    """Return whether an option of that name probably holds a secret."""
    return _SECRET_NAME.search(name) is not None


def mask_url(text: str) -> str:
    """Return *text* with the credentials of every URL in it masked.

    Both the part before ``@`` and options with telling names (``password``, ``token``, …)
    become ``***``. Text without a URL comes back as it is.
    """
    if "://" not in text:
        return text
    text = _CREDENTIALS.sub(rf"\1{_MASK}@", text)
    return _QUERY.sub(
        lambda found: (
            f"{found[1]}{found[2]}={_MASK}" if looks_secret(found[2]) and found[3] else found[0]
        ),
        text,
    )


def redact(text: str, secrets: Iterable[Secret | str | None]) -> str:
    """Return *text* with every occurrence of the *secrets* replaced by ``***``.

    The longest goes first, so that no tail of a secret survives the masking of a shorter
    one. Use it on text that came from elsewhere: a broker's reason, a library's exception.
    """
    values = {value.reveal() if isinstance(value, Secret) else value for value in secrets if value}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, _MASK)
    return text


# --- references ------------------------------------------------------------------------

_KINDS = '{env = "NAME"}, {file = "PATH"} or {command = ["PROGRAM", …]}'
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Reference:
    """Where a secret is kept.

    Attributes:
        kind: ``env``, ``file``, ``command``, or a kind that a plugin resolves.
        ref: Name, path, or the plugin's own form; for ``command`` the argument list.
        timeout: Seconds that a command may run.
    """

    kind: str
    ref: str | tuple[str, ...]
    timeout: float = _COMMAND_TIMEOUT

    def __str__(self) -> str:
        # Other kinds are shown without their reference: `{token = "…"}` is more likely a
        # secret in the wrong place than a reference.
        match self.kind, self.ref:
            case "env", str(name) if _ENV_NAME.fullmatch(name):
                return f"env {name}"
            case "file", str(path):
                return f"file {path}"
            case "command", (program, *_):
                return f"command {program}"
            case _:
                return self.kind

    __repr__ = __str__


def parse_reference(value: Mapping[str, Any], *, place: str) -> Reference:
    """Read a table such as ``{env = "NAME"}``.

    Raises:
        BadOption: It is no reference; the text holds no value, only keys.
    """
    keys = {str(key) for key in value}
    kinds = keys - {"timeout"} if "command" in keys else keys
    if len(kinds) != 1:
        raise BadOption(
            f"{place}: a table with {_listed(keys)} is not a reference to a secret",
            option=place,
            hint=f"write {_KINDS}",
        )
    (kind,) = kinds
    ref = value[kind]
    if kind == "command":
        return _parse_command(ref, value.get("timeout", _COMMAND_TIMEOUT), place)
    if not isinstance(ref, str) or not ref:
        raise BadOption(
            f"{place}: {kind} must be text that is not empty",
            option=place,
            hint=f"write {_KINDS}",
        )
    if kind == "env" and not _ENV_NAME.fullmatch(ref):
        raise BadOption(
            f"{place}: env needs the name of an environment variable",
            option=place,
            hint="give the variable's name, not its value",
        )
    return Reference(kind, ref)


def _parse_command(ref: Any, timeout: Any, place: str) -> Reference:
    if isinstance(ref, str) or not isinstance(ref, (list, tuple)):
        raise BadOption(
            f"{place}: command must be a list of arguments, since no shell reads it",
            option=place,
            hint='write {command = ["PROGRAM", "ARGUMENT"]}',
        )
    arguments = tuple(cast("Sequence[Any]", ref))
    if not arguments or not all(isinstance(part, str) and part for part in arguments):
        raise BadOption(
            f"{place}: command must be a list of texts, the program first", option=place
        )
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise BadOption(f"{place}: timeout must be a number of seconds above 0", option=place)
    return Reference("command", arguments, float(timeout))


def resolve_reference(
    reference: Reference,
    *,
    place: str,
    environ: Mapping[str, str],
    folder: Path | None = None,
    others: Callable[[str, str], str | None] | None = None,
) -> Secret:
    """Fetch the secret. Blocks: a command may take its whole timeout.

    Args:
        reference: The secret to fetch.
        place: Where the reference stands, for errors.
        environ: The environment, also that of a command.
        folder: Where a relative file name starts; the current directory by default.
        others: Asked for kinds other than env, file and command; None means that none knows it.

    Raises:
        ConfigError: It is not there; the text names the place and the remedy, never output.
    """
    match reference.kind, reference.ref:
        case "env", str(name):
            return _from_environment(name, environ, place)
        case "file", str(path):
            return _from_file(path, folder, place)
        case "command", tuple() as arguments:
            return _from_command(arguments, reference.timeout, environ, place)
        case kind, ref:
            return _from_others(kind, str(ref), others, place)


def _from_environment(name: str, environ: Mapping[str, str], place: str) -> Secret:
    value = environ.get(name)
    if value:
        return Secret(value)
    state = "is not set" if value is None else "is empty"
    raise ConfigError(
        f"{place}: environment variable {name} {state}",
        hint=f"set it, or change {place} to refer to another place",
    )


def _from_file(name: str, folder: Path | None, place: str) -> Secret:
    path = Path(name).expanduser()
    if folder is not None:
        path = folder / path
    problem = ""
    data = b""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_SECRET_BYTES + 1)
        text = data.decode()
    except OSError as exc:
        problem = exc.strerror or type(exc).__name__
        text = ""
    except UnicodeDecodeError:
        problem = "it is not UTF-8 text"
        text = ""
    text = _without_newline(text)
    if len(data) > _MAX_SECRET_BYTES:
        problem = f"it is larger than {_MAX_SECRET_BYTES} bytes"
    elif not problem and not text:
        problem = "it is empty"
    if problem:
        raise ConfigError(
            f"{place}: cannot take a secret from file {path}: {problem}",
            hint="create it, readable by this user only, with the secret as its content",
        )
    return Secret(text)


def _from_command(
    arguments: tuple[str, ...], timeout: float, environ: Mapping[str, str], place: str
) -> Secret:
    problem = ""
    text = ""
    try:
        # No shell. Its error stream is dropped: it may repeat the secret.
        done = subprocess.run(  # noqa: S603 - the user's own configuration names the program
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
            env=dict(environ),
            check=False,
        )
        text = _without_newline(done.stdout.decode())
        if done.returncode:
            problem = f"ended with code {done.returncode}"
        elif not text:
            problem = "printed nothing"
        elif len(done.stdout) > _MAX_SECRET_BYTES:
            problem = f"printed more than {_MAX_SECRET_BYTES} bytes"
    except subprocess.TimeoutExpired:
        problem = f"was still running after {timeout:g} s"
    except UnicodeDecodeError:
        problem = "printed something that is not UTF-8 text"
    except (OSError, ValueError) as exc:
        problem = f"could not be started: {getattr(exc, 'strerror', None) or type(exc).__name__}"
    if problem:
        raise ConfigError(
            f"{place}: command {arguments[0]!r} {problem}",
            hint="run it by hand to see its output, which is not shown here",
        )
    return Secret(text)


def _from_others(
    kind: str, ref: str, others: Callable[[str, str], str | None] | None, place: str
) -> Secret:
    value = None
    failure = ""
    if others is not None:
        try:
            value = others(kind, ref)
        except ConfigError:
            raise
        except Exception as exc:  # noqa: BLE001 - plugin code; its text may hold the secret
            failure = type(exc).__name__
    if failure:
        raise ConfigError(
            f"{place}: the plugin for secrets of kind {kind!r} failed with {failure}",
            hint="see that plugin's documentation",
        )
    if not value:
        raise ConfigError(
            f"{place}: no installed plugin resolves a secret of kind {kind!r}, or it has none "
            "under that reference",
            hint=f"use {_KINDS}, or install the plugin that knows {kind!r}",
        )
    return Secret(value)


def _without_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)) or "no keys"
