"""Who may connect, publish and subscribe: the vectors, and what covering and overlapping mean."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_core.errors import BadOption, ConfigError
from pubsub_core.topics import parse_filter
from pubsub_losant.server.access import AccessKey, DeviceSpec, Registry, covers, overlaps
from pubsub_losant.server.config import ApplicationConfig
from tests.losant.application import DEVICES, KEYS, A, B, registry, secret
from tests.losant.vectors import VECTORS

CASES: list[dict[str, Any]] = VECTORS["dev_broker_acl"]["cases"]
IDS = [f"{case['key']} {case['action']} {case['topic'] or case['client']}" for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_rights_of_the_vectors(case: dict[str, Any]) -> None:
    rights = registry()
    key = rights.authenticate(case["key"], secret(case["key"]))
    assert key is not None
    match case["action"]:
        case "connect":
            allowed = rights.may_connect(case["client"], key)
        case "publish":
            allowed = rights.may_publish(case["client"], key, case["topic"])
        case "subscribe":
            allowed = rights.may_subscribe(case["client"], key, case["topic"])
        case other:
            raise AssertionError(other)
    assert allowed is case["allow"], case["why"]


@pytest.mark.parametrize(
    "filter",
    [
        "$SYS/#", "$share/g/foo", "losant/+/state", f"losant/{A}/#", f"losant/{A}/+",
        f"losant/{A}", f"losant/{A}/state/#", f"losant/{A}/state/more", "losant/#", "losantx",
        "losant/nobody/state", f"losant/{A}/toAgent/flows", f"losant/{A}/fromAgent/hello", "+",
    ],
)  # fmt: skip
def test_no_filter_reaches_more_of_the_platform_than_is_allowed(filter: str) -> None:
    rights = registry()
    assert not rights.may_subscribe(A, rights.keys["kAll"], filter)
    assert not rights.may_publish(A, rights.keys["kAll"], "$SYS/x")


def test_no_device_is_called_as_a_wildcard() -> None:
    for name in ("+", "#", "a/b", ""):
        with pytest.raises(BadOption, match="no device id"):
            Registry({name: DeviceSpec()})
    rights = Registry({A: DeviceSpec("edgeCompute")}, [AccessKey("k", "s", device_ids={"+", A})])
    rights.devices["+"] = DeviceSpec("edgeCompute")  # it may be changed while it runs
    for text in ("losant/+/state", "losant/+/command", "losant/+/toAgent/#"):
        assert not rights.may_subscribe("+", rights.keys["k"], text)


def test_credentials_are_compared_as_they_are() -> None:
    rights = Registry(DEVICES, [*KEYS, AccessKey("off", "secret of off", active=False)])
    assert rights.authenticate("kA", secret("kA")) is rights.keys["kA"]
    for key, given_secret in (
        ("kA", b"secret of kR"), ("ka", secret("kA")), ("kA", None), (None, secret("kA")),
        ("kA", b""), ("nobody", b"there is no such key"), ("off", secret("off")),
    ):  # fmt: skip
        assert rights.authenticate(key, given_secret) is None


def test_a_scope_is_the_ids_and_the_devices_with_one_of_the_tags() -> None:
    devices = {
        A: DeviceSpec(tags={"floor": "2"}),
        B: DeviceSpec(tags={"floor": ["1", "2"], "wing": "north"}),
        "c": DeviceSpec(tags={"floor": "3"}),
        "d": DeviceSpec(),
    }
    tagged = AccessKey("t", "s", device_tags=[("floor", "2"), ("wing", "south")])
    both = AccessKey("b", "s", device_ids=["d"], device_tags=[("floor", "3")])
    nothing = AccessKey("n", "s", device_ids=[])
    rights = Registry(devices, [tagged, both, nothing])
    assert [name for name in devices if rights.may_connect(name, tagged)] == [A, B]
    assert [name for name in devices if rights.may_connect(name, both)] == ["c", "d"]
    assert not any(rights.may_connect(name, nothing) for name in devices)


def test_who_speaks_for_a_peripheral_is_its_gateway_with_a_key_for_both() -> None:
    devices = {
        "gate": DeviceSpec("gateway"),
        "plain": DeviceSpec(),
        "bound": DeviceSpec("peripheral", gateway_id="gate"),
        "elsewhere": DeviceSpec("peripheral", gateway_id="plain"),
        "floats": DeviceSpec("floating"),
    }
    everything = AccessKey("all", "s")
    itself = AccessKey("itself", "s", device_ids=["gate", "plain"])
    rights = Registry(devices, [everything, itself])

    def reached(sender: str, key: AccessKey) -> list[str]:
        return [to for to in devices if rights.may_publish(sender, key, f"losant/{to}/state")]

    assert reached("gate", everything) == ["gate", "bound", "floats"]
    assert reached("gate", itself) == ["gate"]
    assert reached("plain", everything) == ["plain"]


def test_a_filter_that_can_reach_a_forbidden_topic_is_refused() -> None:
    key = AccessKey(
        "k", "s", filter_type="blacklist", pub_topics=["a/hidden/#"], sub_topics=["a/hidden/#"]
    )
    for text in ("a/#", "a/+", "a/+/x", "a/hidden", "a/hidden/x"):
        assert not key.may_subscribe(text)
    for text in ("a/open/#", "b/#", "+/open"):
        assert key.may_subscribe(text)
    assert not key.may_publish("a/hidden/x")
    assert key.may_publish("a/open")


LEVELS = st.lists(st.sampled_from(["a", "b", "+"]), min_size=1, max_size=3)
FILTERS = st.builds(
    lambda levels, end: "/".join(levels + ["#"] * end) or "#", LEVELS, st.booleans()
)
TOPICS = ["/".join(levels) for size in (1, 2, 3, 4) for levels in product("abc", repeat=size)]


@given(entry=FILTERS, filter=FILTERS)
def test_covering_and_overlapping_are_what_matching_says(entry: str, filter: str) -> None:
    one, other = parse_filter(entry), parse_filter(filter)
    matched = [topic for topic in TOPICS if other.matches(topic)]
    assert covers(entry, filter) == all(one.matches(topic) for topic in matched)
    assert overlaps(entry, filter) == any(one.matches(topic) for topic in matched)
    assert overlaps(filter, entry) == overlaps(entry, filter)


# --- the file ------------------------------------------------------------------------------

TOML = """
strict = false
throttle = true

[devices.gate]
class = "gateway"
tags = { floor = "2" }
attributes = { temperature = "number" }

[devices.sensor]
class = "peripheral"
gateway_id = "gate"

[[keys]]
key = "AK"
secret = { env = "LOSANT_TEST_SECRET" }
device_tags = [["floor", "2"]]
filter_type = "whitelist"
pub_topics = ["alerts/+"]
"""


def test_a_file_says_it_in_toml_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSANT_TEST_SECRET", "hidden")
    path = tmp_path / "application.toml"
    path.write_text(TOML)
    told = ApplicationConfig.load(path)
    assert (told.strict, told.throttle, told.one_connection) == (False, True, None)
    assert told.devices == {
        "gate": DeviceSpec("gateway", tags={"floor": "2"}, attributes={"temperature": "number"}),
        "sensor": DeviceSpec("peripheral", "gate"),
    }
    assert told.keys is not None
    (key,) = told.keys
    assert (key.key, key.secret) == ("AK", "hidden")
    assert "hidden" not in repr(key)
    assert key.may_publish("alerts/x")
    assert not key.may_subscribe("alerts/x")

    (tmp_path / "s.txt").write_text("from a file\n")
    table = {"devices": {"d": {}}, "keys": [{"key": "k", "secret": {"file": "s.txt"}}]}
    path = tmp_path / "application.json"
    path.write_text(json.dumps(table))
    told = ApplicationConfig.load(path)
    assert told.keys is not None
    assert told.keys[0].secret == "from a file"
    assert told.devices == {"d": DeviceSpec()}


@pytest.mark.parametrize(
    "text",
    [
        "nonsense hidden", "device = {}", "devices = 1", "[devices]\nd = 1",
        '[devices.d]\nclass = "robot"', '[devices."a/b"]', "[devices.d]\ncolour = 1",
        '[devices.d]\nattributes = { a = "colour" }', "strict = 1", "keys = {}",
        '[[keys]]\nkey = "k"', '[[keys]]\nkey = "k"\nsecret = 1',
        '[[keys]]\nkey = "k"\nsecret = { vault = "x" }',
        '[[keys]]\nkey = "k"\nsecret = "hidden"\nfilter_type = "some"',
        '[[keys]]\nkey = "k"\nsecret = "hidden"\npub_topics = ["a/#/b"]',
        '[[keys]]\nkey = ""\nsecret = "hidden"',
    ],
)  # fmt: skip
def test_a_file_with_mistakes_is_refused_without_its_secrets(text: str, tmp_path: Path) -> None:
    path = tmp_path / "application.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        ApplicationConfig.load(path)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "hint"),
    [
        ("devcies = {}", "devcies", "did you mean 'devices'?"),
        ("STRICT = true", "STRICT", "did you mean 'strict'?"),
        ("[devices.d]\nAttributes = {}", "devices.d.Attributes", "did you mean 'attributes'?"),
        ('[[keys]]\nsecret = "hidden"\npub_topic = []', "keys.0.pub_topic", "pub_topics"),
        ("colour = 1", "colour", "it may have devices, keys"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_a_suggestion(
    text: str, name: str, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / "application.toml"
    path.write_text(text)
    with pytest.raises(BadOption, match=f"{re.escape(name)} is not known") as caught:
        ApplicationConfig.load(path)
    assert hint in caught.value.hint


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="No such file"):
        ApplicationConfig.load(tmp_path / "missing.toml")


def test_the_same_key_twice_and_classes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(BadOption):
        Registry(DEVICES, [KEYS[0], KEYS[0]])
    with pytest.raises(BadOption):
        DeviceSpec("robot")  # type: ignore[arg-type]  # as a file may say it
    with pytest.raises(BadOption):
        DeviceSpec(attributes={"a": "colour"})  # type: ignore[dict-item]  # as a file may say it
