"""Writes the tables of the documents: capabilities, options, exit codes.

They are made from the declarations of this distribution's backends (`BackendInfo`), from the
classes of options, and from the command's own table, so they agree with ``pubsub caps`` and
``pubsub config explain``. Text between the markers is replaced::

    <!-- table: capabilities -->
    <!-- end of table -->

Usage: ``python scripts/generate_tables.py [--check]``. With ``--check`` nothing is written
and the exit code is 1 when a table is not current.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from pathlib import Path

from pubsub_core import capabilities
from pubsub_core.capabilities import Cap, Level, Support
from pubsub_core.cli.exits import MEANINGS
from pubsub_core.config.bus_options import BusOptions
from pubsub_core.config.options import FieldHelp, field_help
from pubsub_core.interfaces import BackendInfo

__all__ = ["TABLES", "main", "refreshed"]

ROOT = Path(__file__).resolve().parent.parent

_MARK = {
    Level.NATIVE: "yes",
    Level.EMULATED: "emulated",
    Level.UNKNOWN: "depends",
    Level.NONE: "no",
}
_TABLE = re.compile(
    r"(?P<begin><!-- table: (?P<name>\w+) -->\n)(?P<body>.*?)(?P<end><!-- end of table -->)",
    re.DOTALL,
)


def backends() -> list[BackendInfo]:
    """Return the backends of this distribution, in the order of pyproject.toml.

    Not those of the registry: other distributions may be installed beside this one.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    modules: dict[str, str] = project["entry-points"]["pubsub_core"]
    return [info for name in modules.values() for info in _announced(name)]


def _announced(module: str) -> Sequence[BackendInfo]:
    announce: Callable[[], Sequence[BackendInfo]] | None = getattr(
        importlib.import_module(module), "pubsub_backends", None
    )
    return announce() if announce else ()


def _meanings() -> dict[str, str]:
    """Return the sentence below each member of `Cap`, which only the source has."""
    tree = ast.parse(inspect.getsource(capabilities))
    (cap,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == Cap.__name__
    )
    meanings: dict[str, str] = {}
    for member, text in zip(cap.body, cap.body[1:], strict=False):
        match member, text:
            case (
                ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(sentence))),
            ):
                meanings[name] = " ".join(sentence.replace("``", "`").split()).rstrip(".")
            case _:
                pass
    return meanings


def _support(info: BackendInfo, cap: Cap) -> Support:
    return info.capabilities.get(cap, Support.none("not declared by this backend"))


def _rows(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def capability_table() -> str:
    """Return which backend declares which capability, and why not."""
    infos = backends()
    meanings = _meanings()
    rows = [["capability", "what it is", *(f"`{info.name}`" for info in infos)]]
    rows += [
        [f"`{cap}`", meanings[cap.name], *(_MARK[_support(info, cap).level] for info in infos)]
        for cap in Cap
    ]
    reasons = [
        f"- `{info.name}` has no `{cap}`: {support.why}"
        + (f"; {support.remedy}" if support.remedy else "")
        + "\n"
        for info in infos
        for cap in Cap
        if not (support := _support(info, cap))
    ]
    return (
        _rows(rows)
        + "\n<details><summary>Why not, and what to do instead</summary>\n\n"
        + "".join(reasons)
        + "\n</details>\n"
    )


def _words(value: Enum) -> str:
    return str(value.value).replace("_", " ")


def _size(count: int | None) -> str:
    if count is None:
        return "no limit known"
    if count >= 1024 * 1024 and count % (1024 * 1024) == 0:
        return f"{count // (1024 * 1024)} MiB"
    return f"{count:,} bytes"


def guarantee_table() -> str:
    """Return what each backend promises and where its limits are."""
    infos = backends()
    lines: list[tuple[str, Callable[[BackendInfo], str]]] = [
        ("schemes", lambda info: ", ".join(f"`{scheme}`" for scheme in info.schemes)),
        ("a publish is confirmed by", lambda info: _words(info.guarantees.confirmed_by)),
        ("to subscribers that keep up", lambda info: _words(info.guarantees.delivery)),
        ("delivered again", lambda info: _words(info.guarantees.redelivery)),
        ("order of first arrivals", lambda info: _words(info.guarantees.order)),
        ("duplicates", lambda info: _words(info.guarantees.duplicates)),
        ("survives a restart", lambda info: _words(info.guarantees.durability)),
        ("largest payload", lambda info: _size(info.limits.max_payload)),
        ("longest topic", lambda info: _size(info.limits.max_topic_bytes)),
    ]
    rows = [["with default settings", *(f"`{info.name}`" for info in infos)]]
    rows += [[title, *(show(info) for info in infos)] for title, show in lines]
    notes = [f"\n`{info.name}`: {info.guarantees.note}\n" for info in infos if info.guarantees.note]
    return _rows(rows) + "".join(notes)


def exit_code_table() -> str:
    """Return what the exit codes of the command mean."""
    return _rows([["exit code", "meaning"], *([str(int(c)), m] for c, m in MEANINGS.items())])


def bus_option_table() -> str:
    """Return the options of every bus."""
    rows = [["option", "default", "what it takes", "meaning"]]
    rows += [
        [f"`{each.name}`", _default(each), each.type, each.help] for each in field_help(BusOptions)
    ]
    return _rows(rows)


def backend_option_table(name: str) -> str:
    """Return the options of one backend."""
    (options,) = (info.options for info in backends() if info.name == name)
    rows = [["option", "default", "meaning"]]
    rows += [[f"`{each.name}`", _default(each), each.help] for each in field_help(options)]
    return _rows(rows)


def _default(option: FieldHelp) -> str:
    return f"`{option.default}`" if option.default else ""


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {
        "capabilities": capability_table,
        "guarantees": guarantee_table,
        "exit_codes": exit_code_table,
    },
    ROOT / "docs" / "command-line.md": {"exit_codes": exit_code_table},
    ROOT / "docs" / "configuration.md": {"options": bus_option_table},
    **{
        ROOT / "backends" / name / "README.md": {"options": partial(backend_option_table, name)}
        for name in ("losant", "mqtt", "nats")
    },
}


def refreshed(path: Path, text: str) -> str:
    """Return *text*, which is that of *path*, with every table in it current.

    Raises:
        ValueError: A table is missing, or nobody knows how to make one.
    """
    tables = TABLES[path]
    found = {match["name"] for match in _TABLE.finditer(text)}
    if found != set(tables):
        raise ValueError(f"tables in {path.name}: {sorted(found)}; expected: {sorted(tables)}")
    return _TABLE.sub(lambda match: match["begin"] + tables[match["name"]]() + match["end"], text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables, or check them; return an exit code."""
    parser = argparse.ArgumentParser(description="Make the tables of the documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when out of date")
    options = parser.parse_args(arguments)
    stale = 0
    for path in TABLES:
        text = path.read_text(encoding="utf-8")
        new = refreshed(path, text)
        if new == text:
            continue
        stale += 1
        if options.check:
            print(f"{path.name}: tables are not current; run python scripts/generate_tables.py")
        else:
            path.write_text(new, encoding="utf-8")
            print(f"{path.name}: tables written")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
