"""Topics of the platform and the payload of the agents' greeting; no I/O.

Everything that starts with the six letters ``losant`` belongs to the platform; other topics
are custom and may be used where the access key allows it.

Sources: Losant's documentation of the MQTT broker, and of the embedded edge agent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "MAX_PAYLOAD",
    "check_custom_topic",
    "check_device_id",
    "check_publish_topic",
    "command_topic",
    "encode_hello",
    "hello_topic",
    "is_platform_topic",
    "split_topic",
    "state_topic",
]

MAX_PAYLOAD: Final = 262_144
"""Longest payload in bytes; the platform drops the connection over more."""

_FORBIDDEN: Final = frozenset(" /+#\0")
_PREFIX: Final = "losant/"


def check_device_id(device_id: str) -> str:
    """Return *device_id* if it can be one. The platform's own are 24 hexadecimal digits.

    Raises:
        ValueError: It is empty, or holds a space, ``/``, ``+``, ``#`` or NUL.
    """
    if not isinstance(device_id, str):  # pyright: ignore[reportUnnecessaryIsInstance] # users pass anything
        raise TypeError(f"a device id is text, not {type(device_id).__name__}")
    if not device_id or not _FORBIDDEN.isdisjoint(device_id):
        raise ValueError(f"{device_id!r} is no device id: not empty, no space, '/', '+', '#', NUL")
    return device_id


def state_topic(device_id: str) -> str:
    """Return the topic a device's states are published to."""
    return f"{_PREFIX}{device_id}/state"


def command_topic(device_id: str) -> str:
    """Return the topic a device's commands arrive on."""
    return f"{_PREFIX}{device_id}/command"


def hello_topic(device_id: str) -> str:
    """Return the topic on which edge and embedded agents announce their versions."""
    return f"{_PREFIX}{device_id}/fromAgent/hello"


def is_platform_topic(topic: str) -> bool:
    """Whether a topic or filter begins as the platform's own do."""
    return topic.startswith("losant")


def split_topic(topic: str) -> tuple[str, str] | None:
    """Return device id and the rest (``state``, ``command``, ``fromAgent/hello`` …), or None."""
    if not topic.startswith(_PREFIX):
        return None
    device_id, slash, rest = topic[len(_PREFIX) :].partition("/")
    return (device_id, rest) if slash and device_id and rest else None


def check_custom_topic(topic: str) -> str:
    """Return *topic*, which the platform leaves to its users.

    Raises:
        ValueError: It begins with ``losant``, or with ``$``.
    """
    if is_platform_topic(topic):
        raise ValueError(
            f"{topic!r} begins with 'losant': the platform closes the connection of a device that "
            "uses such a topic; use send_state, or a topic of your own"
        )
    if topic.startswith("$"):
        raise ValueError(f"{topic!r} begins with '$': the platform has no such topics")
    return topic


def check_publish_topic(topic: str) -> str:
    """Return *topic*, which may be published to: a custom one, without wildcards.

    Raises:
        ValueError: It is not.
    """
    if not topic or not {"+", "#", "\0"}.isdisjoint(topic):
        raise ValueError(f"{topic!r} is no topic to publish to")
    return check_custom_topic(topic)


def encode_hello(
    bundle: str = "nullVersion",
    *,
    service: str = "embeddedWorkflowAgent",
    version: str = "1.0.0",
    compiler_options: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the payload of an agent's greeting; *compiler_options* are left out when None."""
    body: dict[str, Any] = {"service": service, "version": version, "bundle": bundle}
    if compiler_options is not None:
        body["compilerOptions"] = dict(compiler_options)
    return json.dumps(body, allow_nan=False).encode()
