"""One program, every broker: the programs in ``examples/`` run on each backend.

Nothing but ``pubsub.toml`` is changed. A program works, with the output that is written here, or
is refused with a reason that is written here; every other end is a failure. The backends' own
development servers stand in for the brokers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pubsub_core.plugins import registry
from pubsub_core.testing.servers import ServerThread, load
from pubsub_mqtt.server import MosquittoServer
from tests.servers import Authority, Certificate

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
DEADLINE = 30.0
"""Seconds that a program may take; the slowest takes two."""

BACKENDS = ("memory", "mqtt", "emitter", "messagebus", "losant", "nats")


@dataclass(frozen=True)
class Program:
    """What a program must do.

    Attributes:
        says: Its whole output, where it works.
        refused: The reason by backend, where it cannot work there.
        buses: Names of the buses that it opens.
    """

    says: str
    refused: dict[str, str] = field(default_factory=dict[str, str])
    buses: tuple[str, ...] = ("main",)


NO_WILDCARDS = {"messagebus": "messagebus has no wildcards"}

PROGRAMS = {
    "quickstart.py": Program(
        "confirmed by the broker\nexample/oven/temp oven 81.5\n", NO_WILDCARDS
    ),
    "plain.py": Program("iterator: 81.5\nhandler: lab/oven/temp 81.5\n", NO_WILDCARDS),
    "oven/oven.py": Program(
        "oven is too hot: 95 °C\n",
        {
            "messagebus": "messagebus has no retained",
            "losant": "losant has no retained",
            "nats": "nats has no retained",
        },
    ),
    "room.py": Program(
        "history: two\nhistory: three\nhere now: []\njoined Ben\n"
        "replay: three\nlive: hello\nleft Ben\n",
        {
            "mqtt": "mqtt has no history, presence, replay",
            "messagebus": "messagebus has no history, replay",
            "losant": "losant has no history, presence, replay",
            "nats": "nats has no history, presence, replay",
        },
        buses=("ann", "ben"),
    ),
    "tls/tls.py": Program("hello\n"),
}


def _run(program: Path, **environment: str) -> tuple[int, str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PUBSUB_")}
    done = subprocess.run(
        [sys.executable, program.name],
        cwd=program.parent,
        env=kept | {"PYTHONWARNINGS": "error", "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def url_of() -> Iterator[Callable[[str], str]]:
    """Return a function that gives the URL of a backend's server, which it starts."""
    with ExitStack() as stack:
        urls = {"memory": "memory://examples"}

        def url(backend: str) -> str:
            if backend not in urls:
                found = registry().by_name(backend)
                assert found.dev_server is not None
                thread = ServerThread(load(found.dev_server)())
                thread.start()
                stack.callback(thread.stop)
                own: Callable[[], str] | None = getattr(thread.server, "client_url", None)
                urls[backend] = own() if own is not None else thread.server.url
            return urls[backend]

        yield url


FAULTS = {
    ("room.py", "emitter"): "a presence room does not learn of subscribers with wildcards",
}
"""Our own, which are to go."""


def _rows() -> Iterator[object]:
    for name in PROGRAMS:
        for backend in BACKENDS:
            # A process for each: what every change needs to know, memory and one broker tell.
            marks = [] if backend in ("memory", "mqtt") else [pytest.mark.slow]
            if reason := FAULTS.get((name, backend)):
                marks.append(pytest.mark.xfail(reason=reason, strict=True))
            yield pytest.param(name, backend, marks=marks, id=f"{name}-{backend}")


@pytest.mark.parametrize(("name", "backend"), list(_rows()))
def test_a_program_runs_on_every_broker(
    name: str, backend: str, url_of: Callable[[str], str], tmp_path: Path
) -> None:
    program = PROGRAMS[name]
    copy = Path(shutil.copy(EXAMPLES / name, tmp_path))
    # Who is on a bus is a matter of configuration as well, where the broker knows of users.
    user = 'username = "{}"' if backend in ("memory", "emitter") else ""
    (tmp_path / "pubsub.toml").write_text(
        "".join(
            f'[bus.{bus}]\nurl = "{url_of(backend)}"\n{user.format(bus.title())}\n'
            for bus in program.buses
        ),
        encoding="utf-8",
    )
    code, out, err = _run(copy, ONCE="1")
    if (reason := program.refused.get(backend)) is None:
        assert (code, out, err) == (0, program.says, "")
    else:
        assert (code, out) == (1, ""), err
        assert reason in err.splitlines()[-1], err


def test_every_program_and_every_backend_has_its_row() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    found = {
        path.relative_to(EXAMPLES).as_posix()
        for path in EXAMPLES.rglob("*.py")
        if EXAMPLES / "backend" not in path.parents  # see test_example_backend.py
    }
    assert found == set(PROGRAMS)
    for name in found:
        assert f"({name})" in listed
    announced = {info.name for info in registry().infos}
    assert announced == set(BACKENDS), "a backend without a row, or a row without a backend"
    for program in PROGRAMS.values():
        assert set(program.refused) < set(BACKENDS)


# The pubsub.toml of the other names a broker and certificates, which the test after this makes.
@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() - {"tls/tls.py"}))
def test_a_program_runs_as_it_is(name: str) -> None:
    program = PROGRAMS[name]
    environment = {"PUBSUB_PROFILE": "test"} if name == "oven/oven.py" else {}
    assert _run(EXAMPLES / name, ONCE="1", **environment) == (0, program.says, "")


def test_tls_verifies_what_pubsub_toml_names(
    mosquitto_client_certificates: MosquittoServer,
    authority: Authority,
    client_certificate: Certificate,
    tmp_path: Path,
) -> None:
    copy = Path(shutil.copy(EXAMPLES / "tls" / "tls.py", tmp_path))
    text = (EXAMPLES / "tls" / "pubsub.toml").read_text(encoding="utf-8")
    for ours, theirs in (
        ("mqtts://broker.example", mosquitto_client_certificates.url),
        ("ca.pem", authority.cafile),
        ("me.crt", client_certificate.certfile),
        ("me.key", client_certificate.keyfile),
    ):
        assert f'"{ours}"' in text
        text = text.replace(f'"{ours}"', f'"{theirs}"')
    (tmp_path / "pubsub.toml").write_text(text, encoding="utf-8")
    assert _run(copy) == (0, "hello\n", "")
    # The system does not know this authority.
    without = re.sub(r"^ca_file.*\n", "", text, flags=re.MULTILINE)
    assert without != text
    (tmp_path / "pubsub.toml").write_text(without, encoding="utf-8")
    code, out, err = _run(copy)
    assert (code, out) == (1, "")
    assert err.startswith("tls")
