"""Classes of options with a field of each kind."""

from __future__ import annotations

import enum
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from pubsub_core.secrets import Secret


class Mode(enum.StrEnum):
    FAST = "fast"
    SAFE = "safe"


@dataclass(frozen=True)
class Auth:
    user: str
    password: Secret | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    keepalive: int = field(default=60, metadata={"help": "seconds between pings"})
    ratio: float = 0.5
    clean: bool = True
    client_id: str | None = None
    expiry: int | None = None
    level: Annotated[int, Meta(ge=0, le=2)] = 1
    mode: Mode = Mode.SAFE
    kind: Literal["a", "b"] = "a"
    patience: bool | float = True
    number_or_word: int | Literal["auto"] = "auto"
    names: tuple[str, ...] = ()
    pair: tuple[int, str] = (1, "x")
    ring: Mapping[str, Secret] = field(default_factory=dict[str, Secret])
    headers: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    password: Secret | None = None
    auth: Auth | None = None
    ca_file: Path | None = None
    data: bytes = b""
    anything: Any = None
    context: ssl.SSLContext | None = None
    hook: Any = field(default=None, metadata={"code_only": True})
