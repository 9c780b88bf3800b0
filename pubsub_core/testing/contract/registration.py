"""Announcements of a backend, before any session: cases 1 to 10."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import importlib
import logging
import pickle
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pubsub_core.capabilities import (
    Cap,
    ConfirmedBy,
    Delivery,
    Duplicates,
    Durability,
    Guarantees,
    Level,
    Limits,
    Order,
    Redelivery,
    Support,
    effective,
)
from pubsub_core.config import Config
from pubsub_core.config.bus_options import BusOptions
from pubsub_core.errors import BadOption, ConnectError, MissingDependency, PluginError, PubSubError
from pubsub_core.hookspecs import hookimpl
from pubsub_core.interfaces import (
    API_VERSION,
    Backend,
    BackendInfo,
    HasAcknowledgement,
    HasAuthorization,
    HasHistory,
    HasNotifications,
    HasPresence,
    HasRetained,
    HasUnicast,
)
from pubsub_core.plugins import Registry, registry
from pubsub_core.testing.case import case
from pubsub_core.testing.servers import free_port, load
from pubsub_core.testing.trial import Trial

__all__: list[str] = []

CANARY = "canary-Xq7PfZ29"
"""A password that must never be seen again."""

_POWERS: dict[Cap, type[Any]] = {
    Cap.PRESENCE: HasPresence,
    Cap.NOTIFICATIONS: HasNotifications,
    Cap.HISTORY: HasHistory,
    Cap.RETAINED: HasRetained,
    Cap.UNICAST: HasUnicast,
    Cap.ACK: HasAcknowledgement,
    Cap.AUTHORIZATION: HasAuthorization,
}


async def _python(t: Trial, program: str) -> subprocess.CompletedProcess[str]:
    return await t.within(
        asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        ),
        30,
    )


@case(1, alone=True)
async def info_readable_without_client_library(t: Trial) -> None:
    """The announcement can be read where the client library is not installed."""
    found = await _python(
        t,
        f"""
        import sys
        for name in {t.harness.client_modules!r}:
            sys.modules[name] = None  # importing it raises ImportError now
        from pubsub_core.plugins import registry
        info = registry().by_scheme({t.harness.scheme!r})
        assert info.name and info.capabilities and info.guarantees and info.limits
        print(info.name)
        """,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == t.info.name


@case(2, alone=True)
async def missing_dependency_names_install_line(t: Trial) -> None:
    """A client library that is not installed becomes an error with the command to type."""
    folder = tempfile.TemporaryDirectory(prefix="pubsub-conformance-")
    t.stack.callback(folder.cleanup)
    module = f"conformance_{t.word}"
    path = Path(folder.name) / f"{module}.py"
    await asyncio.to_thread(path.write_text, "import pubsub_module_that_nobody_has\n")
    forged = dataclasses.replace(
        t.info, factory=f"{module}:Backend", install="pip install that-thing"
    )
    sys.path.insert(0, folder.name)
    try:
        with t.raises(MissingDependency) as caught:
            registry().load(forged)
    finally:
        sys.path.remove(folder.name)
    assert "pip install that-thing" in str(caught[0])
    assert isinstance(caught[0].__cause__, ImportError)
    if not t.harness.client_modules:
        return
    found = await _python(
        t,
        f"""
        import asyncio, sys
        for name in {t.harness.client_modules!r}:
            sys.modules[name] = None
        from pubsub_core import MissingDependency, connect
        async def main():
            try:
                async with connect({t.url()!r}):
                    pass
            except MissingDependency as error:
                print(error)
        asyncio.run(main())
        """,
    )
    assert found.returncode == 0, found.stderr
    assert t.info.install, "the backend has a client library but no install line"
    assert t.info.install in found.stdout


@case(3)
async def schemes_unique_and_lowercase(t: Trial) -> None:
    """No scheme is claimed twice, and each finds its backend."""
    seen: dict[str, str] = {}
    for info in registry().infos:
        for scheme in info.schemes:
            assert scheme == scheme.lower(), f"{scheme!r} of {info.name} is not lower case"
            assert scheme not in seen, f"{scheme!r} belongs to {seen[scheme]} and {info.name}"
            seen[scheme] = info.name
    assert t.info.schemes
    for scheme in t.info.schemes:
        assert registry().by_scheme(scheme).name == t.info.name
    assert registry().by_name(t.info.name) is t.info
    assert t.info.name == t.info.name.lower()


@case(4)
async def options_reject_unknown_key_with_suggestion(t: Trial) -> None:
    """A misspelt option is refused, in URL and file alike, and the right name is offered."""
    names = ["buffer", *[field.name for field in dataclasses.fields(t.info.options)][:3]]
    for name in names:
        if len(name) < 4:
            continue
        wrong = name[:-2] + name[-1]
        mark = "&" if "?" in t.url() else "?"
        with t.raises(BadOption) as caught:
            await t.connect(query=f"{mark}{wrong}=1")
        assert wrong in str(caught[0])
        assert name in str(caught[0]), f"{name!r} is not offered for {wrong!r}: {caught[0]}"
        path = await _toml(t, {wrong: 1})
        with t.raises(BadOption) as caught:
            Config.load(path).bus("main")
        assert wrong in str(caught[0])
        assert name in str(caught[0])
    with t.raises(BadOption):
        await t.connect(no_such_option_at_all=1)


async def _toml(t: Trial, values: dict[str, Any]) -> Any:
    folder = tempfile.TemporaryDirectory(prefix="pubsub-conformance-")
    t.stack.callback(folder.cleanup)
    lines = ["[bus.main]", f'url = "{t.url()}"']
    for name, value in values.items():
        text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
        lines.append(f"{name} = {text}")
    path = Path(folder.name) / "pubsub.toml"
    await asyncio.to_thread(path.write_text, "\n".join(lines) + "\n")
    return path


@case(5)
async def options_roundtrip_url_and_toml(t: Trial) -> None:
    """The same options come out of the URL's query and of a file."""
    given: dict[str, Any] = {
        "buffer": 17,
        "overflow": "drop_newest",
        "timeout": 2.5,
        "echo": True,
        "offline": "buffer",
    }
    own: dict[str, Any] = {}
    said = parse_qs(urlsplit(t.url()).query)
    for field in dataclasses.fields(t.info.options):
        plain = type(field.default) in (bool, int, float)
        if plain and field.default is not dataclasses.MISSING and field.name not in said:
            own[field.name] = field.default
    query = "&".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in {**own, **given}.items()
    )
    mark = "&" if "?" in t.url() else "?"
    from_url = Config.load(await _toml(t, {})).bus(t.url() + mark + query)
    from_toml = Config.load(await _toml(t, {**own, **given})).bus("main")
    assert from_url.options == from_toml.options
    assert from_url.bus == from_toml.bus
    assert from_url.bus.buffer == 17
    assert from_url.bus.overflow == "drop_newest"
    assert from_url.bus.timeout == 2.5
    assert isinstance(from_url.bus, BusOptions)
    assert type(from_url.options) is t.info.options


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@case(6)
async def secrets_masked_everywhere(t: Trial) -> None:
    """A password appears in no repr, error, log line, event, explanation or pickle."""
    lines = _Lines()
    root = logging.getLogger()
    level = root.level
    root.addHandler(lines)
    root.setLevel(logging.DEBUG)
    texts: list[str] = []
    rest = t.url().partition("://")[2].rpartition("@")[2]
    url = f"{t.harness.scheme}://user:{CANARY}@{rest}"
    try:
        with_secret = t.bus(identity=url)
        texts += [repr(with_secret), str(with_secret)]
        try:
            await t.within(with_secret.open())
        except ConnectError as error:
            t.note(error)
            texts += _texts(error)
        texts += [repr(with_secret), str(with_secret.info), repr(with_secret.stats)]
        await t.within(with_secret.close())
        closed = f"{t.harness.scheme}://user:{CANARY}@127.0.0.1:{free_port()}"
        for bad in (f"{url}?no_such_option=1", closed, f"nosuch{url}", f"{url}/+/#"):
            try:
                bus = t.bus(identity=bad)
                texts.append(repr(bus))
                await t.within(bus.open())
                texts.append(repr(bus.status))
            except PubSubError as error:
                texts += _texts(error)
        config = Config.load(await _toml(t, {}))
        built = config.bus(url)
        texts += [repr(built), str(built), repr(built.address), repr(built.options)]
        texts += [str(config.explain(url)), repr(config.explain(url))]
        with contextlib.suppress(TypeError):  # refused, which is as good
            texts.append(pickle.dumps(built).decode("latin-1"))
        with contextlib.suppress(TypeError):
            texts.append(repr(copy.copy(built.address)))
    finally:
        root.removeHandler(lines)
        root.setLevel(level)
    for text in texts + lines.lines:
        where = text.find(CANARY)
        assert where < 0, f"a secret was printed: …{text[max(0, where - 200) : where]}"


def _texts(error: BaseException | None) -> list[str]:
    found: list[str] = []
    while error is not None:
        found += [str(error), repr(error), repr(error.args), repr(vars(error))]
        error = error.__cause__
    return found


@case(7)
async def contract_version_checked(t: Trial) -> None:
    """A backend written for another major version of the contract is refused by name."""
    assert t.info.api[0] == API_VERSION[0]
    assert t.info.api <= API_VERSION
    forged = dataclasses.replace(t.info, api=(API_VERSION[0] + 1, 0))

    class Plugin:
        @hookimpl
        def pubsub_backends(self) -> list[BackendInfo]:
            return [forged]

    refusing = Registry.from_plugins({"forged": Plugin()})
    assert not refusing.infos
    for ask in (refusing.by_name, refusing.by_scheme):
        with t.raises(PluginError) as caught:
            ask(t.info.name if ask == refusing.by_name else t.harness.scheme)
        assert t.info.name in str(caught[0])
        assert str(API_VERSION[0] + 1) in str(caught[0])


@case(8)
async def declared_caps_match_methods(t: Trial) -> None:
    """A capability is claimed exactly where its methods are there."""
    backend = registry().load(t.info)
    assert issubclass(backend, Backend)
    declared = effective(t.info.capabilities, {})
    wrong: list[str] = []
    for cap, power in _POWERS.items():
        claimed = declared[cap].level is not Level.NONE
        there = issubclass(backend, power)
        if claimed != there:
            wrong.append(f"{cap}: claimed {claimed}, {power.__name__} implemented {there}")
    for cap, method in ((Cap.PING, "ping"), (Cap.FLOW_CONTROL, "pause")):
        claimed = declared[cap].level is not Level.NONE
        there = getattr(backend, method) is not getattr(Backend, method)
        if claimed != there:
            wrong.append(f"{cap}: claimed {claimed}, {method}() implemented {there}")
    assert not wrong, "; ".join(wrong)
    assert set(t.info.capabilities) <= set(Cap)
    for cap, support in declared.items():
        assert isinstance(support, Support)
        if support.level is not Level.NATIVE:
            assert support.why, f"{cap} is {support.level} without a reason"
    if declared[Cap.NACK]:
        assert declared[Cap.ACK], "giving back without acknowledging makes no sense"
    if declared[Cap.REPLAY]:
        assert declared[Cap.HISTORY], "replaying needs a history"
    importlib.import_module(t.info.factory.partition(":")[0])
    if t.info.dev_server:
        server = registry().load_dev_server(t.info)
        assert server.backend == t.info.name
        assert load(t.info.dev_server) is server


@case(9)
async def guarantees_complete(t: Trial) -> None:
    """Every guarantee and limit is stated, with a legal value."""
    bus = await t.connect()
    for guarantees in (t.info.guarantees, bus.guarantees):
        assert isinstance(guarantees, Guarantees)
        assert guarantees.confirmed_by in ConfirmedBy
        assert guarantees.delivery in Delivery
        assert guarantees.redelivery in Redelivery
        assert guarantees.order in Order
        assert guarantees.duplicates in Duplicates
        assert guarantees.durability in Durability
        assert guarantees.note, "a reader must be told what the enumerations cannot say"
    for limits in (t.info.limits, bus.limits):
        assert isinstance(limits, Limits)
        for number in (limits.max_payload, limits.max_topic_bytes, limits.max_levels):
            assert number is None or number > 0
        for rate in (limits.rate, limits.rate_per_topic):
            assert rate is None or (rate[0] > 0 and rate[1] > 0)
    redelivers = bus.guarantees.redelivery is not Redelivery.NEVER
    claimed = bus.supports(Cap.REDELIVERY).level is not Level.NONE
    assert redelivers == claimed, "guarantee and capability of redelivery disagree"


@case(10)
async def probe_only_lowers(t: Trial) -> None:
    """An open session offers no more than was declared."""
    bus = await t.connect()
    rank = [Level.NONE, Level.UNKNOWN, Level.EMULATED, Level.NATIVE]
    declared = effective(t.info.capabilities, {})
    assert set(bus.capabilities) == set(Cap)
    for cap in Cap:
        found = bus.supports(cap)
        assert found == bus.capabilities[cap]
        ceiling = declared[cap].level
        if ceiling is not Level.UNKNOWN:
            assert rank.index(found.level) <= rank.index(ceiling), f"{cap} was raised"
        if found.level is Level.NONE:
            assert found.why, f"{cap} is missing without a reason"
