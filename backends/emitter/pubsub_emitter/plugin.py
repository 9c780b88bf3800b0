"""Answers to ``emitter://``, its TLS and its WebSocket variants; plain data.

The declaration is the most that a broker with storage allows a client with all keys;
`EmitterBackend.probe` lowers it to the given keys and options.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from pubsub_core.capabilities import AT_MOST_ONCE, Cap, Limits, Support
from pubsub_core.hookspecs import hookimpl
from pubsub_core.interfaces import BackendInfo

from .options import EmitterOptions

__all__ = ["INFO", "MAX_PAYLOAD", "MAX_STORED_PAYLOAD", "MAX_TOPIC", "pubsub_backends"]

MAX_TOPIC: Final = 1024
"""Bytes of a topic, so that with key and options there is room for `MAX_PAYLOAD`."""

MAX_PAYLOAD: Final = 64_000
"""Bytes: a packet of Emitter's has 65,536, of which the topic takes some."""

MAX_STORED_PAYLOAD: Final = 47_000
"""Bytes: a longer message could be stored, but history, which is base64 in one packet, could
never give it."""

# Of the characters that channels cannot hold, those that somebody may type; the backend refuses
# the others, which are checked once for each topic and not with every message.
_FORBIDDEN: Final = " !\"%&'()*,;<=>?@{|}~"

INFO = BackendInfo(
    name="emitter",
    schemes=("emitter", "emitters", "emitter+tls", "emitter+ws", "emitter+wss"),
    factory="pubsub_emitter.backend:EmitterBackend",
    about="Emitter: keys for channels, history, presence",
    capabilities={
        Cap.WILDCARDS: Support.native(
            "the broker's own rule may deliver more, which is filtered here"
        ),
        Cap.GROUPS: Support.native(
            "with a key that covers $share/<group>/<channel>; groups with different filters need "
            "different names, since the broker's own rule may reach below a channel"
        ),
        Cap.RETAINED: Support.emulated(
            "the newest stored message of a topic, whether it was stored for retain=True or for a "
            "ttl; an empty one means none; for filters that name their first level, and looked for "
            "among the newest 1,000 there and below"
        ),
        Cap.HISTORY: Support.native(
            "of messages with ttl=, retain=True or the option store, for filters that name their "
            "first level"
        ),
        Cap.REPLAY: Support.native(
            "of messages with ttl=, retain=True or the option store, for filters that name their "
            "first level"
        ),
        Cap.TTL: Support.native("how long a message is stored; live delivery is not affected"),
        Cap.HEADERS: Support.none("a message is its payload", "put them into the payload"),
        Cap.CONTENT_TYPE: Support.none("a message is its payload", "agree on one for each topic"),
        Cap.PRESENCE: Support.native(
            "whom the broker would send a message: subscribers of wildcards and of channels above "
            "are listed, too, and that they leave is noticed after presence_refresh seconds; of "
            "more than one packet can list, about a thousand, changes can be told only"
        ),
        Cap.NOTIFICATIONS: Support.emulated(
            "from presence changes; who was there before is told for exact topics only"
        ),
        Cap.UNICAST: Support.none(
            "messages go to channels, not to clients", "make a private channel with keygen()"
        ),
        Cap.ACK: Support.none("deliveries have quality of service 0"),
        Cap.NACK: Support.none("deliveries have quality of service 0"),
        Cap.REDELIVERY: Support.none(
            "messages are sent once", "publish with ttl= and subscribe with replay="
        ),
        Cap.FLOW_CONTROL: Support.none("the broker closes the connection of a slow reader"),
        Cap.ECHO_CONTROL: Support.native("me=0"),
        Cap.REFUSAL_VISIBLE: Support.native("emitter/error/, at quality of service 1"),
        Cap.AUTH: Support.none(
            "anyone can connect; keys decide what may be done", "refusals are NotAuthorized"
        ),
        Cap.PERSISTENT_SESSION: Support.none(
            "the broker keeps nothing of a connection", "set store, so that history fills the gap"
        ),
        Cap.WILL: Support.native("option will; published after a clean end, too"),
        Cap.SOURCE: Support.none("the broker does not tell who published"),
        Cap.SOURCE_LOST: Support.none("the broker does not tell", "agree on a will"),
        Cap.ENTITLEMENTS: Support.none("keys are for whole channels"),
        Cap.AUTHORIZATION: Support.none("the broker decides by itself, from keys"),
        Cap.PING: Support.native("PINGREQ"),
    },
    guarantees=replace(
        AT_MOST_ONCE,
        note=(
            "The broker's confirmation means that it took the message. Deliveries are not "
            "acknowledged, and what is published while a subscriber is away reaches it only where "
            "it was stored."
        ),
    ),
    limits=Limits(
        max_payload=MAX_PAYLOAD,
        max_topic_bytes=MAX_TOPIC,
        max_levels=None,
        forbidden_characters=_FORBIDDEN,
        allow_empty_levels=False,
        notes={
            "stored": f"{MAX_STORED_PAYLOAD:,} bytes where a message is stored, so that history "
            "can give it",
            "characters": "levels are of A-Z a-z 0-9 and $ - . : [ \\ ] ^ _ `",
            "names": "topics below emitter/ and $share/ are the broker's",
            "levels": "the embedded server takes 128; a key names 23",
            "qos": "0 and 1",
        },
    ),
    options=EmitterOptions,
    install="pip install 'paho-mqtt>=2.1,<3'",
    dev_server="pubsub_emitter.server:EmitterServer",
)


@hookimpl
def pubsub_backends() -> list[BackendInfo]:
    """Announce the Emitter backend."""
    return [INFO]
