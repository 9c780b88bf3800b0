"""A table of a distributor's configuration file, read strictly.

A key that is passed over in silence opens a server: with ``alow`` or, in a reader that minds
case, ``Deny``, everybody may do everything. So every table names its legal keys, and all others
are refused. Keys ignore case, as the original's do, and underscores, so ``isAuthorized``,
``IsAuthorized`` and ``is_authorized`` are one key; a table that has it twice is refused.

Names of feeds, hosts and users are no keys: case counts there, as in the original.

Source: Microsoft.Extensions.Configuration, with which the original reads its file; it raises
for a key that stands twice, and passes over unknown ones.
"""

from __future__ import annotations

import json
import os
import re
import socket
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pubsub_core.config.options import unknown_option
from pubsub_core.errors import BadOption
from pubsub_core.secrets import Secret

__all__ = ["Table", "bad_value", "entries", "expand", "load_file"]

BACKEND = "messagebus"

_VARIABLE = re.compile("%([A-Za-z_][A-Za-z0-9_]*)%")


class Table:
    """One table. Names given to its methods are Python's, e.g. ``is_authorized``.

    Args:
        values: The parsed value; refused unless it is a table.
        place: Where it stands, for errors; empty for the file itself.
        legal: Names of all keys that may stand there.
        folder: Where relative paths start.
    """

    def __init__(
        self, values: object, place: str, legal: Iterable[str], folder: Path | None = None
    ) -> None:
        self.place = place
        self.folder = folder or Path()
        names = {_normal(name): name for name in legal}
        self._found: dict[str, tuple[str, Any]] = {}
        for key, value in entries(values, place):
            name = names.get(_normal(key))
            if name is None:
                camel = any(letter.isupper() for letter in key)
                raise unknown_option(
                    key,
                    [_camel(each) if camel else each for each in names.values()],
                    place=self._at(key),
                    backend=BACKEND,
                    what="key",
                )
            if name in self._found:
                raise bad_value(self._at(key), f"there twice, as {self._found[name][0]!r} too")
            self._found[name] = (key, value)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def value(self, name: str) -> Any:
        """Return the value as it was parsed, or None."""
        return self._found[name][1] if name in self._found else None

    def where(self, name: str) -> str:
        """Return the place of a key, as the file spells it."""
        return self._at(self._found[name][0] if name in self._found else name)

    def either(self, *names: str) -> str:
        """Return which of several names for one thing is there; the first when none is.

        Raises:
            BadOption: Two are there.
        """
        found = [name for name in names if name in self]
        if len(found) > 1:
            raise bad_value(self.where(found[1]), f"given beside {self._found[found[0]][0]}")
        return found[0] if found else names[0]

    def only(self, name: str, *others: str) -> None:
        """Refuse every key but *name* and *others*.

        Raises:
            BadOption: Something does.
        """
        for each in self._found:
            if each not in (name, *others):
                raise bad_value(
                    self.where(each),
                    f"given beside {self.where(name)}",
                    f"put it into {self.where(name)}",
                )

    def table(self, name: str, legal: Iterable[str]) -> Table:
        """Return a table inside; an absent one is empty."""
        return Table(self.value(name) if name in self else {}, self.where(name), legal, self.folder)

    def named(self, name: str) -> list[tuple[str, Any]]:
        """Return the entries of a table whose keys are names of somebody's choice."""
        return list(entries(self.value(name), self.where(name))) if name in self else []

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.value(name) if name in self else default
        if not isinstance(value, bool):
            raise bad_value(self.where(name), "neither true nor false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text; without a default it must be there."""
        if name not in self:
            if default is None:
                raise bad_value(self.where(name), "missing")
            return default
        value = self.value(name)
        if not isinstance(value, str):
            raise bad_value(self.where(name), "no text")
        return value

    def texts(self, name: str, default: Iterable[str]) -> list[str]:
        """Return a list of texts; a single text is one."""
        value: Any = self.value(name) if name in self else list(default)
        found = cast("list[Any]", [value] if isinstance(value, str) else value)
        if not isinstance(value, (str, list)) or not all(isinstance(each, str) for each in found):
            raise bad_value(self.where(name), "no list of texts")
        return found

    def secrets(self, name: str) -> list[Secret]:
        """Return the texts of a list that `load_file` has hidden; an absent one is empty."""
        value: Any = self.value(name) if name in self else []
        if not isinstance(value, list) or not all(isinstance(each, Secret) for each in value):  # pyright: ignore[reportUnknownVariableType]
            raise bad_value(self.where(name), "no list of texts")
        return cast("list[Secret]", value)

    def path(self, name: str, default: str | None = "") -> str:
        """Return a path, or nothing; see `resolve`."""
        text = self.text(name, default)
        return self.resolve(text, self.where(name)) if text else ""

    def resolve(self, path: str, place: str) -> str:
        """Return a path with its variables expanded; a relative one starts at the file's folder.

        Raises:
            BadOption: A variable is not set.
        """
        return str(self.folder / expand(path, place))

    def number(self, name: str, default: float) -> float:
        """Return a number of seconds."""
        value = self.value(name) if name in self else default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise bad_value(self.where(name), "no number of seconds")
        return float(value)

    def port(self, name: str) -> int | None:
        """Return a port; None where the file says nothing."""
        if name not in self:
            return None
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65535:
            raise bad_value(self.where(name), "no port")
        return value

    def _at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key


def entries(values: object, place: str) -> Iterator[tuple[str, Any]]:
    """Return the items of a table.

    Raises:
        BadOption: It is no table.
    """
    if not isinstance(values, Mapping):
        raise bad_value(place, "no table")
    table: Mapping[object, Any] = values  # pyright: ignore[reportUnknownVariableType]
    for key, value in table.items():
        yield str(key), value


def load_file(path: str | Path) -> dict[str, Any]:
    """Read a TOML or JSON file.

    JSON is taken as the original takes it, except that comments and commas before a closing
    bracket are not.

    Raises:
        BadOption: It is missing, does not parse, or has a key twice.
    """
    file = Path(path)
    found: object = None
    fault = "holds no table"
    try:
        if file.suffix == ".toml":
            found = _hide(tomllib.loads(file.read_text(encoding="utf-8-sig")))
        else:
            found = _hide(json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_once))
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    except ValueError as error:
        fault = f"is not valid: {error}"
    if not isinstance(found, dict):
        # Outside of the handlers: the parser's frames hold the text, which may hold a key.
        raise BadOption(f"{file} {fault}", option="config", backend=BACKEND)
    return cast("dict[str, Any]", found)


def _hide(values: object) -> object:
    """Return the parsed values, with the arguments of authenticators as secrets.

    The original's take keys of tokens there; hidden, they show in no traceback that is
    printed with its variables.
    """
    if not isinstance(values, dict):
        return values
    found: dict[str, object] = {}
    for key, value in cast("dict[str, object]", values).items():
        if _normal(key) == "args" and isinstance(value, list):
            found[key] = [Secret(each) if isinstance(each, str) else each for each in value]  # pyright: ignore[reportUnknownVariableType]
        else:
            found[key] = _hide(value)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python's reader keeps the last of two; of two roles that is as good as a guess.
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one table")
    return found


def expand(text: str, place: str) -> str:
    """Replace ``%NAME%`` by the environment's value, as the original does in the same places.

    A shell knows ``HOSTNAME`` and rarely exports it; without it, it is this machine's name.

    Raises:
        BadOption: A variable is not set. The original leaves its name in the text.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1]
        known = os.environ.get(name)
        if known is None and name == "HOSTNAME":
            known = socket.gethostname()
        if known is None:
            raise bad_value(place, f"made with %{name}%, which is not set", f"export {name}")
        return known

    return _VARIABLE.sub(value, text)


def bad_value(place: str, what: str, hint: str = "") -> BadOption:
    """Make the error for something that does not fit; its value is not shown."""
    return BadOption(
        f"the configuration's {place or 'content'} is {what}",
        option=place,
        hint=hint,
        backend=BACKEND,
    )


def _normal(key: str) -> str:
    return key.replace("_", "").lower()


def _camel(name: str) -> str:
    return re.sub("_([a-z])", lambda found: found[1].upper(), name)
