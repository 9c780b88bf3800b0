"""What README.md and the other documents say is true: their programs run, their links lead on.

A block of Python or TOML that begins with a file's name (``# oven.py``) is that file; a block of
a console is a session in the folder that holds the files of its chapter. ``$`` begins a
command, what follows is its output, and ``…`` stands for anything. A command that ends in ``&``
runs until the end of the chapter. Blocks after ``<!-- fragment -->`` are read but not run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.readme import BLOCK, DEADLINE, ROOT

README = ROOT / "README.md"
BIN = Path(sys.executable).parent
PORT = "1883"
"""Port of the broker in the text; in the test it is a free one."""
_NAME = re.compile(r"# (?P<name>[\w.]+\.(?:py|toml))\n")


@dataclass
class Chapter:
    """The text below one heading, until the next."""

    title: str
    files: dict[str, str] = field(default_factory=dict[str, str])
    sessions: list[str] = field(default_factory=list[str])
    fragments: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Each command with the output that is said to follow."""
        found: list[tuple[str, str]] = []
        for session in self.sessions:
            for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                found.append((command, output))
        return found


def _chapters() -> Iterator[Chapter]:
    text = README.read_text(encoding="utf-8")
    outside = BLOCK.sub(lambda match: "\n" * match[0].count("\n"), text)
    # Headings are looked for where no block is: a comment in Python looks like one.
    starts = [0]
    lines = outside.split("\n")
    starts += [number for number, line in enumerate(lines) if line.startswith("#") and number]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        body = "\n".join(text.split("\n")[start:end])
        chapter = Chapter(lines[start].lstrip("# "))
        for match in BLOCK.finditer(body):
            name = _NAME.match(match["body"])
            if match["fragment"]:
                chapter.fragments.append((match["language"], match["body"]))
            elif match["language"] == "console":
                chapter.sessions.append(match["body"])
            elif name is not None:
                chapter.files[name["name"]] = match["body"]
            else:
                raise AssertionError(f"README.md, {chapter.title}: a block without a file's name")
        yield chapter


CHAPTERS = list(_chapters())
SET_UP, *REST = CHAPTERS
RUN = [chapter for chapter in REST if chapter.commands]
_FILES = {name: text for chapter in CHAPTERS for name, text in chapter.files.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment() -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PUBSUB_")}
    return environment | {
        "PATH": f"{BIN}{os.pathsep}{environment.get('PATH', os.defpath)}",
        "PYTHONWARNINGS": "error",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
    }


class Shell:
    """Runs commands in one folder, and ends what still runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: list[subprocess.Popen[str]] = []

    def run(self, command: str) -> str:
        if command.endswith(" &"):
            self._start(command.removesuffix(" &"))
            return ""
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=self.folder,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # as in a terminal
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}"
        return done.stdout

    def _start(self, command: str) -> None:
        process = subprocess.Popen(
            shlex.split(command),
            cwd=self.folder,
            env=_environment(),
            stdout=subprocess.PIPE,
            text=True,
            executable=str(BIN / shlex.split(command)[0]),
        )
        self._running.append(process)
        assert process.stdout is not None
        # A server's first line says that it is ready; pytest's deadline ends a wait in vain.
        assert "ready" in process.stdout.readline()

    def close(self) -> None:
        for process in self._running:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise
            assert process.returncode == 0


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.close()


def _matches(expected: str, output: str) -> bool:
    # A line that is only … stands for any number of lines.
    pattern = "".join(
        r"(?:.*\n)*" if line == "…\n" else re.escape(line).replace("…", ".*")
        for line in expected.splitlines(keepends=True)
    )
    return re.fullmatch(pattern, output) is not None


@pytest.mark.parametrize("chapter", RUN, ids=lambda chapter: chapter.title)
def test_a_chapter_does_what_it_says(chapter: Chapter, shell: Shell) -> None:
    port = str(_free_port())
    for name, text in _FILES.items():
        (shell.folder / name).write_text(text.replace(PORT, port), encoding="utf-8")
    for command, expected in chapter.commands:
        output = shell.run(command.replace(PORT, port))
        output = "".join(f"{line.rstrip()}\n" for line in output.splitlines())
        assert _matches(expected.strip("\n") + "\n" if expected.strip() else "", output), (
            f"$ {command}\nsaid:\n{output}\nREADME.md says:\n{expected}"
        )


def test_every_file_is_run() -> None:
    run = " ".join(command for chapter in RUN for command, _ in chapter.commands)
    for name in _FILES:
        assert name == "pubsub.toml" or name in run, f"README.md: {name} is never run"


def test_fragments_are_well_formed() -> None:
    for chapter in CHAPTERS:
        for language, body in chapter.fragments:
            match language:
                case "python":
                    compile(body, chapter.title, "exec")
                case "toml":
                    tomllib.loads(body)
                case _:
                    raise AssertionError(f"{chapter.title}: nobody can check {language!r}")


def test_the_configuration_that_is_shown_is_legal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pubsub_core.config import Config

    (body,) = (
        body
        for chapter in CHAPTERS
        if chapter.title == "Configuration"
        for language, body in chapter.fragments
        if language == "toml"
    )
    path = tmp_path / "pubsub.toml"
    path.write_text(body, encoding="utf-8")
    path.chmod(0o600)
    environ = {"MQTT_PASSWORD": "x"}
    config = Config.load(path, environ=environ)
    assert [str(finding) for finding in config.lint()] == []
    assert config.bus("main").info.name == "mqtt"
    assert Config.load(path, environ=environ, profile="test").bus("main").info.name == "memory"


def test_the_set_up_is_two_commands_of_one_line() -> None:
    (demo, _), (tests, _) = SET_UP.commands
    # What .ci/run takes out of this file and runs.
    assert demo.endswith("pubsub demo")
    assert tests.endswith("pytest")
    for command in (demo, tests):
        assert command.startswith("python3 -m venv ")
        assert "\n" not in command


def test_the_tables_are_current() -> None:
    spec = importlib.util.spec_from_file_location(
        "generate_tables", ROOT / "scripts" / "generate_tables.py"
    )
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for path in tables.TABLES:
        text = path.read_text(encoding="utf-8")
        assert tables.refreshed(path, text) == text, "run python scripts/generate_tables.py"
    # It would notice: a table that says something else is put right.
    text = README.read_text(encoding="utf-8")
    spoiled = text.replace("| `history` |", "| `mystery` |")
    assert spoiled != text
    assert tables.refreshed(README, spoiled) == text


# --- promises --------------------------------------------------------------------------------


def test_every_test_that_a_promise_names_is_there() -> None:
    from pubsub_core.testing.contract import CASES

    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    promises = re.split(r"^## \d+\. ", text, flags=re.MULTILINE)[1:]
    assert len(promises) == 18
    cases = {case.name for case in CASES}
    for promise in promises:
        title = promise.partition("\n")[0]
        named = re.findall(r"`(tests/[\w/]+\.py)`:((?:\s+`test_\w+`,?)+)", promise)
        for path, listed in named:
            source = (ROOT / path).read_text(encoding="utf-8")
            for test in re.findall(r"`(test_\w+)`", listed):
                assert re.search(rf"def {test}\b", source), f"{title}: {path} has no {test}"
        found = set(re.findall(r"\*(\w+)\*", promise))
        assert found <= cases, f"{title}: the suite has no {sorted(found - cases)}"
        assert named or found, f"{title}: nothing proves it"


# --- links -----------------------------------------------------------------------------------

_LINK = re.compile(r"\]\((?P<target>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
_DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "backends/*/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)


def _anchors(path: Path) -> set[str]:
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", _DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for match in _LINK.finditer(BLOCK.sub("", path.read_text(encoding="utf-8"))):
        target, anchor = match["target"], match["anchor"]
        if "://" in target or target.startswith("mailto:"):
            continue
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{path.name} links to {target}"
        if anchor is not None:
            assert anchor in _anchors(there), f"{path.name} links to {target}#{anchor}"
