"""Two backends, a plugin that fails, and a file for them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pubsub_core.config import Config
from pubsub_core.hookspecs import hookimpl
from pubsub_core.interfaces import BackendInfo
from pubsub_core.secrets import Secret
from tests.test_plugins import ACME as TEMPLATE
from tests.test_secrets import CANARY


@dataclass(frozen=True)
class Auth:
    user: str = ""
    password: Secret | None = None


@dataclass(frozen=True)
class AcmeOptions:
    keepalive: int = 60
    client_id: str | None = None
    password: Secret | None = None
    keys: Mapping[str, Secret] = field(default_factory=dict[str, Secret])
    auth: Auth | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)


@dataclass(frozen=True)
class MemoryOptions:
    history: int = 100
    client_id: str = ""
    password: Secret | None = None


ACME = replace(TEMPLATE, name="acme", schemes=("acme", "acmes", "acme+ws"), options=AcmeOptions)


MEMORY = replace(TEMPLATE, name="memory", schemes=("memory",), options=MemoryOptions)


class Plugin:
    @hookimpl
    def pubsub_backends(self) -> list[BackendInfo]:
        return [ACME, MEMORY]

    @hookimpl
    def pubsub_secret(self, kind: str, ref: str) -> str | None:
        return f"{CANARY}:{ref}" if kind == "keyring" else None


class Broken:
    @hookimpl
    def pubsub_backends(self) -> list[BackendInfo]:
        raise ImportError("no libbroken")


FILE = """
[bus.main]
url = "acme://broker:1883?keepalive=30"
qos = 0
client_id = "from-file"
password = { env = "BROKER_PW" }

[[bus.main.codecs]]
match = "cam/#"
codec = "bytes"

[bus.edge]
url = "acmes://edge"

[profile.test.bus.main]
url = "memory://"

[profile.staging.bus.main]
url = "acme://staging"
"""


def loaded(text: str, tmp_path: Path, *, mode: int = 0o600, **environ: str) -> Config:
    path = tmp_path / "pubsub.toml"
    path.write_text(textwrap.dedent(text))
    path.chmod(mode)
    return Config.load(path, environ=environ)


def write(path: Path, host: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'[bus.main]\nurl = "acme://{host}"\n')
    return path
