"""Tests stand where the source stands: ``tests/mqtt/connection/test_dial.py`` is of ``dial`` there.

A test file has the name of a module or of a package, and its place below the tests is theirs
below their package. What judges more than one room is named here, with the reason.
"""

from __future__ import annotations

from pathlib import Path, PurePath

import pytest

from tests.test_package import CHECKOUT, FOLDERS, PACKAGES

TESTS = Path(__file__).parent

EXCEPTIONS = {
    "promises/*": "docs/promises.md, one file a promise or two: whole programs under faults",
    "conformance/*": "the contract, one file a backend",
    "brokers/*": "the contract, and what else we say of brokers, on brokers of others",
    "test_package.py": "what the packages look like from outside",
    "test_layers.py": "the arrows between the rooms",
    "test_mirror.py": "this",
    "test_walks.py": "which files a run passes through",
    "test_moving.py": "docs/moving-to-0.2.md",
    "**/test_readme.py": "what a README says is what happens",
    "messagebus/test_package_readme.py": "the README of the package that the client stands for",
    "test_examples.py": "every program in examples/, on every broker",
    "test_example_backend.py": "the backend in examples/, as its author would test it",
    "**/test_interop.py": "clients and servers of others, or ours together",
    "**/test_sdk.py": "the vendors' clients",
    "**/test_abuse.py": "what attacks take from a server and from those beside them",
    "config/test_page.py": "docs/configuration.md",
    "cli/test_memory.py": "commands for what only memory has",
    "cli/test_pub_sub.py": "`pub` and `sub` together, as processes",
    "emitter/test_exchanges.py": "packets captured from the Go broker",
    "losant/client/test_gateway.py": "a gateway is in both devices' modules",
    "losant/test_command_line.py": "a program of two processes",
    "losant/test_defects.py": "the defects of losant-mqtt 1.2.1, by name",
    "losant/test_platform.py": "the real platform",
    "losant/test_protocol.py": "the vectors of times, states, commands and topics",
    "messagebus/server/test_ldap.py": "a real directory",
    "messagebus/test_other_distributors.py": "a distributor seen from outside only",
    "mqtt/test_amqtt_names.py": "what programs for amqtt look at",
    "mqtt/test_earlier_process.py": "a session from one process to the next",
    "messagebus/test_secrets.py": "no fault shows a secret, wherever it comes from",
    "nats/test_commands.py": "the command with NATS",
    "nats/test_presence.py": "presence and notifications, from bus to server",
    "nats/test_programs.py": "one application file, wherever it runs",
    "nats/test_versions.py": "servers of other versions",
    "nats/test_cluster.py": "three servers, one of which is killed",
    "nats/test_stream.py": "stream mode, from URL to server",
    "nats/test_connect.py": "credentials and TLS, from URL to server",
}

OTHERWISE = {
    "testing/contract": "every backend runs it: tests/conformance",
}
"""Rooms that have no tests of their own."""

pytestmark = pytest.mark.skipif(not CHECKOUT, reason="the tests of a checkout")


def rooms() -> set[PurePath]:
    """Return every module and package of ours, placed as its tests would be."""
    found: set[PurePath] = set()
    for folder, package in zip(FOLDERS, PACKAGES, strict=True):
        top = PurePath() if package == "pubsub_core" else PurePath(package.removeprefix("pubsub_"))
        for path in folder.rglob("*.py"):
            place = top / path.relative_to(folder).with_suffix("")
            found.add(place.parent if place.name == "__init__" else place)
    return found - {PurePath()}


def mirrored() -> dict[PurePath, PurePath]:
    """Return for each test file the place that it has by its name."""
    files = (path.relative_to(TESTS) for path in TESTS.rglob("test_*.py"))
    return {path: path.parent / path.stem.removeprefix("test_") for path in files}


def test_every_test_file_stands_where_what_it_tests_stands_or_is_named() -> None:
    ours, used, astray = rooms(), set[str](), list[str]()
    for path, place in mirrored().items():
        if place in ours:
            continue
        named = {pattern for pattern in EXCEPTIONS if _matches(path, pattern)}
        used |= named
        if not named:
            astray.append(str(path))
    assert sorted(astray) == [], "neither a module's nor a package's place"
    assert set(EXCEPTIONS) - used == set(), "exceptions that nothing needs any more"


def test_every_room_has_tests() -> None:
    ours = rooms()
    packages = ours & {place.parent for place in ours}
    tested = {place for path, named in mirrored().items() for place in (path.parent, named)}
    without = {str(place) for place in packages if place not in tested}
    assert without == set(OTHERWISE)


def _matches(path: PurePath, pattern: str) -> bool:
    if pattern.startswith("**/"):  # Python 3.11 has no such pattern
        return path.match(pattern.removeprefix("**/"))
    return path.match(pattern) and len(path.parts) == len(PurePath(pattern).parts)
