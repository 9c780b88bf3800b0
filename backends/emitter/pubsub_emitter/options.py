"""Options of the Emitter backend. Plain data: importing this module imports no MQTT library.

Times are seconds. Keys, master key and license are secrets, and shown nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pubsub_core.errors import BadOption
from pubsub_core.secrets import Secret
from pubsub_mqtt.options import TransportOptions, WillOptions

from .keys import InvalidLicense, License

__all__ = ["ChannelKeys", "EmitterOptions", "MatcherOption", "read_license"]

MatcherOption = Literal["auto", "emitter", "mqtt"]


def _help(text: str, **more: object) -> dict[str, object]:
    return {"help": text, **more}


def read_license(text: str) -> License:
    """Read the text of a license.

    Raises:
        BadOption: It is none; nothing of the text is in the error.
    """
    try:
        return License.parse(text)
    except InvalidLicense as exc:
        raise BadOption(
            f"license: {exc}",
            option="license",
            hint="give all of its text, with :1, :2 or :3 at the end",
            backend="emitter",
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelKeys:
    """The keys for the topics that match one pattern.

    Attributes:
        key: For everything that has no key of its own here.
        read: For subscribing.
        write: For publishing, and storing what is published.
        load: For history.
        presence: For presence and notifications.
    """

    key: Secret | None = None
    read: Secret | None = None
    write: Secret | None = None
    load: Secret | None = None
    presence: Secret | None = None

    def __post_init__(self) -> None:
        if not any((self.key, self.read, self.write, self.load, self.presence)):
            raise BadOption(
                "a table of keys without any key",
                option="keys",
                hint="give key, or one of read, write, load and presence",
                backend="emitter",
            )

    def pairs(self) -> Iterator[tuple[str, Secret]]:
        """Yield the letters of permissions and the key for them."""
        own = {"r": self.read, "ws": self.write, "l": self.load, "p": self.presence}
        for letters, secret in own.items():
            if secret is not None:
                yield letters, secret
        rest = "".join(letters for letters, secret in own.items() if secret is None)
        if self.key is not None and rest:
            yield rest, self.key


@dataclass(frozen=True, slots=True, kw_only=True)
class EmitterOptions(TransportOptions):
    """Options of a connection to an Emitter broker.

    Any client can connect; keys decide about each operation. `key` is for all topics, `keys` for
    those that match a pattern, and with `master_key` or `license` the backend makes itself a
    key for each topic, which can do no more than is needed there.
    """

    key: Secret | None = field(
        default=None, metadata=_help("key for every topic that no pattern of keys matches")
    )
    keys: Mapping[str, ChannelKeys | Secret] = field(
        default_factory=dict[str, "ChannelKeys | Secret"],
        repr=False,
        metadata=_help(
            "filter → key, or {key, read, write, load, presence}; the most specific filter wins"
        ),
    )
    master_key: Secret | None = field(
        default=None,
        metadata=_help("has the broker make a narrow key where no key is given"),
    )
    license: Secret | None = field(
        default=None, metadata=_help("makes narrow keys here, without asking the broker")
    )
    key_ttl: int = field(
        default=86_400,
        metadata=_help("seconds that keys made by the backend are valid; 0: they do not expire"),
    )
    store: int | None = field(
        default=None,
        metadata=_help(
            "seconds that every message is stored for; default: those with ttl= or retain=True"
        ),
    )
    matcher: MatcherOption = field(
        default="auto",
        metadata=_help(
            "the broker's matching rule; auto: found out with a master key or license, else "
            "filters with # are subscribed to in both ways"
        ),
    )
    presence_refresh: float = field(
        default=30.0,
        metadata=_help("seconds between looks for members whose leaving is not told; 0: never"),
    )
    username: str | None = field(
        default=None, metadata=_help("shown in presence; wins over the URL's user")
    )
    password: Secret | None = field(
        default=None, metadata=_help("sent, and ignored by the broker; wins over the URL's")
    )
    keepalive: int = field(
        default=60,
        metadata=_help(
            "seconds; the peer is dead after 1.5 times that in silence; 0 and more than 90 are "
            "90, since brokers close links that were silent for 120"
        ),
    )
    max_inflight: int = field(
        default=100, metadata=_help("most publishes that wait for the broker's confirmation")
    )
    will: WillOptions | None = field(
        default=None,
        metadata=_help("{topic, payload, retain}: published when the connection ends, in any way"),
    )
    ws_path: str | None = field(
        default=None, metadata=_help("WebSocket path; wins over the URL's; default: /")
    )

    def __post_init__(self) -> None:
        for name, least in (("key_ttl", 0), ("store", 1), ("presence_refresh", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value <= 0xFFFF_FFFF:
                raise BadOption(
                    f"{name}={value!r} does not fit",
                    option=name,
                    hint=f"use seconds, {least} or more",
                    backend="emitter",
                )
        # Checked now rather than when the first session is opened.
        self.mqtt(backend="emitter", protocol="3.1.1")
