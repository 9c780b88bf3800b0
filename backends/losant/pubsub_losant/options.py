"""Options of the Losant backend. Plain data: importing this module imports no MQTT library.

Times are seconds. Access key and secret are secrets, and shown nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pubsub_core.errors import BadOption
from pubsub_core.secrets import Secret
from pubsub_mqtt.options import TransportOptions, WillOptions

from .pacing_rules import PLATFORM, is_platform
from .topics import check_device_id

__all__ = ["LosantOptions", "Transport"]

Transport = Literal["tcp", "websockets"]


def _help(text: str, **more: object) -> dict[str, object]:
    return {"help": text, **more}


def bad_option(option: str, problem: str, hint: str) -> BadOption:
    """Return the error for an option that does not fit."""
    return BadOption(problem, option=option, hint=hint, backend="losant")


@dataclass(frozen=True, slots=True, kw_only=True)
class LosantOptions(TransportOptions):
    """Options of a device's connection.

    Key and secret may stand in the URL as well; those here win. `endpoint` is a host, since the
    place of the host is the device's id; a port other than the usual one stands behind that.
    """

    access_key: Secret | None = field(
        default=None, metadata=_help("access key; wins over the URL's user")
    )
    access_secret: Secret | None = field(
        default=None, metadata=_help("its secret; wins over the URL's password")
    )
    endpoint: str = field(
        default=PLATFORM, metadata=_help("host of the broker; its port stands in the URL")
    )
    transport: Transport | None = field(
        default=None, metadata=_help("tcp or websockets; default: as the scheme says")
    )
    secure: bool = field(
        default=True, metadata=_help("false: without TLS, for tests and development")
    )
    peripherals: tuple[str, ...] = field(
        default=(),
        metadata=_help("ids of a gateway's peripherals, for the topics ID/state and ID/command"),
    )
    rate_guard: bool | None = field(
        default=None,
        metadata=_help(
            "keep below the platform's limits, which bans who exceeds them; default: at the "
            "platform"
        ),
    )
    keepalive: int = field(
        default=15,
        metadata=_help("seconds; the peer is dead after 1.5 times that in silence; 0: never"),
    )
    max_inflight: int = field(
        default=100, metadata=_help("most publishes that wait for the broker's confirmation")
    )
    will: WillOptions | None = field(
        default=None,
        metadata=_help("{topic, payload}: published when the connection is lost, e.g. a state"),
    )
    cert_file: str | None = field(
        default=None, metadata=_help("certificate of the device, PEM; in place of key and secret")
    )

    def __post_init__(self) -> None:
        host = self.endpoint
        # An IPv6 address has two colons or more; host:port has one.
        if not host or host.count(":") == 1 or not set("/[]@ ").isdisjoint(host):
            raise bad_option(
                "endpoint",
                f"endpoint={host!r} is no host",
                "a name or address alone; the port stands behind the device id",
            )
        for name in self.peripherals:
            try:
                check_device_id(name)
            except ValueError as exc:
                raise bad_option("peripherals", str(exc), "ids of devices") from None
        will = self.will
        if will is not None and (will.retain or will.qos == 2 or will.delay):
            raise bad_option(
                "will",
                "the platform refuses a will with retain, quality of service 2 or a delay",
                "give topic and payload, and qos 0 or 1",
            )
        # Checked now rather than when the first session is opened.
        self.mqtt(backend="losant")

    @property
    def guards(self) -> bool:
        """Whether the limits are kept."""
        if self.rate_guard is not None:
            return self.rate_guard
        return is_platform(self.endpoint)
