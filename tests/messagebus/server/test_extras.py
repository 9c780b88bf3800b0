"""The extra ``messagebus-server``: what it brings, and what is said without it."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "backends" / "messagebus" / "pubsub_messagebus"

MODULES = {"jwt", "ldap3", "prometheus_client"}

# As in an environment that has none of them.
WITHOUT = """
import sys
for module in {modules}:
    sys.modules[module] = None
"""

PROGRAM = """
from pubsub_core.errors import MissingDependency
from pubsub_messagebus.server import MessageBusServer
from pubsub_messagebus.server.authenticators import JwtServerAuthenticator, LdapServerAuthenticator

MessageBusServer()
for make in (
    lambda: MessageBusServer(metrics_port=0),
    lambda: JwtServerAuthenticator("x" * 32),
    lambda: JwtServerAuthenticator("", algorithms=["RS256"]),
    lambda: LdapServerAuthenticator("ldaps://directory"),
):
    try:
        print("made a", type(make()).__name__)
    except MissingDependency as error:
        print(error.hint)
"""
# What it prints where none of them is; a clean installation is asked as well.
WITHOUT_EXTRA = ["pip install 'pubsub-core[messagebus-server]'"] * 4


def extra() -> set[str]:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = told["project"]["optional-dependencies"]["messagebus-server"]
    return {_normal(re.split(r"[\[<>=]", each)[0]) for each in wanted}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_that_is_loaded_on_demand_is_in_the_extra() -> None:
    loaded = {
        name
        for path in SOURCES.rglob("*.py")
        for name in re.findall(r'load_extra\("(\w+)', path.read_text(encoding="utf-8"))
    }
    assert loaded == MODULES
    by_module = importlib.metadata.packages_distributions()
    assert {_normal(found) for name in loaded for found in by_module[name]} == extra()


@pytest.mark.slow
def test_the_server_needs_none_of_it_and_each_part_names_the_line_that_installs_it() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT.format(modules=sorted(MODULES)) + PROGRAM],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.splitlines() == WITHOUT_EXTRA


@pytest.mark.slow
def test_each_part_is_made_where_the_extra_is_installed() -> None:
    for module in MODULES:
        pytest.importorskip(module, reason="the extra messagebus-server is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "made a MessageBusServer",
        "made a JwtServerAuthenticator",
        "made a JwtServerAuthenticator",
        "made a LdapServerAuthenticator",
    ]
