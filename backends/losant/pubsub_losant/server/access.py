"""Who may connect, publish and subscribe: devices, access keys, scopes and topics; no I/O.

A `Registry` holds the devices and keys of one application and answers questions. It changes
nothing, so a broker can ask before it changes any state.

Rules that no documentation gives, and that are decided here: ids are compared as they are
given; a wildcard before or within a name that begins with ``losant`` is refused; a filter is
allowed by a list of allowed topics when everything it matches is matched by one entry, and
refused by a list of forbidden ones when it can match a topic of an entry.

Sources: Losant's documentation of access keys (restrictions, topic filters), of device classes
(gateways, peripherals) and of the MQTT broker (topics of the platform).
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from pubsub_core.errors import BadOption, InvalidFilter
from pubsub_core.topics import validate_filter
from pubsub_losant.topics import check_device_id, is_platform_topic, split_topic

__all__ = [
    "AccessKey",
    "AttributeType",
    "DeviceClass",
    "DeviceSpec",
    "FilterType",
    "Registry",
    "covers",
    "overlaps",
]

DeviceClass = Literal[
    "standalone", "gateway", "edgeCompute", "embedded", "peripheral", "floating", "system"
]
AttributeType = Literal["string", "number", "boolean", "gps", "blob"]
FilterType = Literal["none", "all", "whitelist", "blacklist"]

CONNECTABLE: Final = frozenset({"standalone", "gateway", "edgeCompute", "embedded"})
_GATEWAYS: Final = frozenset({"gateway", "edgeCompute", "embedded"})
_AGENTS: Final = frozenset({"edgeCompute", "embedded"})
_CLASSES: Final = frozenset({*CONNECTABLE, "peripheral", "floating", "system"})
_TYPES: Final = frozenset({"string", "number", "boolean", "gps", "blob"})
_FILTER_TYPES: Final = frozenset({"none", "all", "whitelist", "blacklist"})


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device of the application.

    Attributes:
        cls: Its class. Only standalone devices, gateways, and edge and embedded ones connect.
        gateway_id: The gateway of a peripheral.
        tags: Values by tag; a tag may have several.
        attributes: Types by attribute; attributes that are not there are dropped. None takes
            every attribute.
    """

    cls: DeviceClass = "standalone"
    gateway_id: str | None = None
    tags: Mapping[str, str | Sequence[str]] = field(default_factory=dict[str, str])
    attributes: Mapping[str, AttributeType] | None = None

    def __post_init__(self) -> None:
        if self.cls not in _CLASSES:
            raise BadOption(
                f"no device class {self.cls!r}",
                option="class",
                hint=f"one of {', '.join(sorted(_CLASSES))}",
                backend="losant",
            )
        for name, kind in (self.attributes or {}).items():
            if kind not in _TYPES:
                raise BadOption(
                    f"attribute {name!r} has no type {kind!r}",
                    option="attributes",
                    hint=f"one of {', '.join(sorted(_TYPES))}",
                    backend="losant",
                )

    def has_tag(self, name: str, value: str) -> bool:
        """Whether the device has that value of a tag."""
        found = self.tags.get(name)
        return found == value if found is None or isinstance(found, str) else value in found


@dataclass(frozen=True, slots=True)
class AccessKey:
    """One access key.

    Attributes:
        device_ids: Devices it is for; with neither these nor *device_tags* it is for all.
        device_tags: Tags and values; devices with one of them are in its scope, too.
        filter_type: Which custom topics it may use: none, all, those of the lists, or all but
            those.
        pub_topics: Filters of topics to publish to.
        sub_topics: Filters of topics to subscribe to.
    """

    key: str
    secret: str = field(repr=False)
    device_ids: Collection[str] | None = None
    device_tags: Sequence[tuple[str, str]] | None = None
    filter_type: FilterType = "none"
    pub_topics: Sequence[str] = ()
    sub_topics: Sequence[str] = ()
    active: bool = True

    def __post_init__(self) -> None:
        if not self.key or not self.secret:
            raise BadOption("an access key needs a key and a secret", option="keys")
        if self.filter_type not in _FILTER_TYPES:
            raise BadOption(
                f"no filter type {self.filter_type!r}",
                option="filter_type",
                hint="one of none, all, whitelist, blacklist",
                backend="losant",
            )
        for text in (*self.pub_topics, *self.sub_topics):
            try:
                validate_filter(text)
            except InvalidFilter as exc:
                raise BadOption(
                    f"{text!r} is no topic filter: {exc}", option="topics", backend="losant"
                ) from exc

    def is_for(self, device_id: str, device: DeviceSpec) -> bool:
        """Whether a device is in the scope of the key."""
        if self.device_ids is None and self.device_tags is None:
            return True
        if self.device_ids is not None and device_id in self.device_ids:
            return True
        return any(device.has_tag(name, value) for name, value in self.device_tags or ())

    def may_publish(self, topic: str) -> bool:
        """Whether the key allows to publish to a custom topic."""
        match self.filter_type:
            case "none":
                return False
            case "all":
                return True
            case "whitelist":
                return any(covers(entry, topic) for entry in self.pub_topics)
            case "blacklist":
                return not any(covers(entry, topic) for entry in self.pub_topics)

    def may_subscribe(self, filter: str) -> bool:
        """Whether the key allows to subscribe to a filter of custom topics."""
        match self.filter_type:
            case "none":
                return False
            case "all":
                return True
            case "whitelist":
                return any(covers(entry, filter) for entry in self.sub_topics)
            case "blacklist":
                return not any(overlaps(entry, filter) for entry in self.sub_topics)


class Registry:
    """The devices and access keys of one application; both may be changed at any time."""

    def __init__(
        self, devices: Mapping[str, DeviceSpec] | None = None, keys: Iterable[AccessKey] = ()
    ) -> None:
        self.devices = dict(devices or {})
        for device_id in self.devices:
            try:
                check_device_id(device_id)
            except (TypeError, ValueError) as exc:
                raise BadOption(str(exc), option="devices", backend="losant") from None
        self.keys: dict[str, AccessKey] = {}
        for key in keys:
            if key.key in self.keys:
                raise BadOption(f"two access keys {key.key!r}", option="keys", backend="losant")
            self.keys[key.key] = key

    def authenticate(self, key: str | None, secret: bytes | None) -> AccessKey | None:
        """Return the active access key that these credentials name, or None."""
        if key is None or secret is None:
            return None
        found = self.keys.get(key)
        # The comparison takes place for unknown keys as well, and takes as long.
        wanted = found.secret.encode() if found is not None else b"there is no such key"
        same = hmac.compare_digest(wanted, secret)
        return found if same and found is not None and found.active else None

    def may_connect(self, device_id: str, key: AccessKey) -> bool:
        """Whether a device is there, of a class that connects, and in the key's scope."""
        device = self.devices.get(device_id)
        return device is not None and device.cls in CONNECTABLE and key.is_for(device_id, device)

    def may_publish(self, device_id: str, key: AccessKey, topic: str) -> bool:
        """Whether a connected device may publish to *topic*."""
        if topic.startswith("$"):
            return False
        if not is_platform_topic(topic):
            return key.may_publish(topic)
        device, found = self.devices.get(device_id), split_topic(topic)
        if device is None or found is None:
            return False
        target, rest = found
        if target == device_id:
            return rest == "state" or (device.cls in _AGENTS and rest.startswith("fromAgent/"))
        peripheral = self.devices.get(target)
        return (
            rest == "state"
            and peripheral is not None
            and device.cls in _GATEWAYS
            and key.is_for(target, peripheral)
            and (
                peripheral.cls == "floating"
                or (peripheral.cls == "peripheral" and peripheral.gateway_id == device_id)
            )
        )

    def may_subscribe(self, device_id: str, key: AccessKey, filter: str) -> bool:
        """Whether a connected device may subscribe to *filter*."""
        first = filter.partition("/")[0]
        if filter.startswith("$") or first in ("+", "#"):
            return False
        if not is_platform_topic(filter):
            return key.may_subscribe(filter)
        device, found = self.devices.get(device_id), split_topic(filter)
        if device is None or found is None:
            return False
        target, rest = found
        if target == "+":  # no device id, whatever the registry has
            return False
        if rest in ("state", "command"):
            other = self.devices.get(target)
            return other is not None and key.is_for(target, other)
        return target == device_id and device.cls in _AGENTS and rest.startswith("toAgent/")


def covers(entry: str, filter: str) -> bool:
    """Whether everything that *filter* matches is matched by *entry*; a topic is a filter, too.

    >>> covers("alerts/#", "alerts/+"), covers("alerts/+", "alerts/#")
    (True, False)
    >>> covers("alerts/#", "alerts")
    True
    """
    wide, narrow = entry.split("/"), filter.split("/")
    for at, level in enumerate(wide):
        if level == "#":
            return True
        if at >= len(narrow):
            return False
        other = narrow[at]
        if other == "#" or (level not in ("+", other)):
            return False
    return len(wide) == len(narrow)


def overlaps(one: str, other: str) -> bool:
    """Whether some topic is matched by both filters. No topic begins with ``$`` here.

    >>> overlaps("private/#", "+/x"), overlaps("private/#", "public/#")
    (True, False)
    """
    left, right = one.split("/"), other.split("/")
    for a, b in zip(left, right, strict=False):
        if "#" in (a, b):
            return True
        if a != b and "+" not in (a, b):
            return False
    if len(left) == len(right):
        return True
    longer = max(left, right, key=len)
    return longer[min(len(left), len(right))] == "#"
