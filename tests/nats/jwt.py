"""Keys and JWTs as ``nsc`` makes them: an operator, an account, users that expire.

Source: NATS ADR-14 (JWT, ``ed25519-nkey``); nats-server 2.9.10 and 2.15.1 take what this makes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import time
from typing import Any

nkeys: Any = importlib.import_module("nkeys")


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Key:
    """A key pair of one kind: ``operator``, ``account`` or ``user``."""

    def __init__(self, kind: str) -> None:
        prefix = {
            "operator": nkeys.PREFIX_BYTE_OPERATOR,
            "account": nkeys.PREFIX_BYTE_ACCOUNT,
            "user": nkeys.PREFIX_BYTE_USER,
        }[kind]
        self.seed: str = nkeys.encode_seed(os.urandom(32), prefix).decode()
        self._pair = nkeys.from_seed(bytearray(self.seed.encode()))
        self.public: str = self._pair.public_key.decode()

    def sign(self, claims: dict[str, Any]) -> str:
        body = {"iat": int(time.time()), "iss": self.public, **claims}
        body["jti"] = (
            base64.b32encode(hashlib.sha512(json.dumps(body).encode()).digest()[:32])
            .decode()
            .rstrip("=")
        )
        head = _b64(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
        text = f"{head}.{_b64(json.dumps(body).encode())}"
        return f"{text}.{_b64(self._pair.sign(text.encode()))}"


class Operator:
    """An operator with one account; `config` lets a server trust it."""

    def __init__(self) -> None:
        self.key, self.account = Key("operator"), Key("account")
        me = self.key.sign(
            {
                "sub": self.key.public,
                "name": "O",
                "nats": {"type": "operator", "version": 2},
            }
        )
        limits = {
            "subs": -1,
            "data": -1,
            "payload": -1,
            "imports": -1,
            "exports": -1,
            "wildcards": True,
            "conn": -1,
            "leaf": -1,
            "mem_storage": -1,
            "disk_storage": -1,
            "streams": -1,
            "consumer": -1,
        }
        account = self.key.sign(
            {
                "sub": self.account.public,
                "name": "A",
                "nats": {"type": "account", "version": 2, "limits": limits},
            }
        )
        self.config = (
            f"operator: {me}\nresolver: MEMORY\n"
            f"resolver_preload: {{ {self.account.public}: {account} }}\n"
        )

    def credentials(self, *, expires_in: float | None = None) -> str:
        """Return the text of a .creds file of a new user."""
        user = Key("user")
        claims: dict[str, Any] = {
            "sub": user.public,
            "name": "u",
            "nats": {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1},
        }
        if expires_in is not None:
            claims["exp"] = int(time.time() + expires_in)
        return (
            "-----BEGIN NATS USER JWT-----\n"
            f"{self.account.sign(claims)}\n"
            "------END NATS USER JWT------\n\n"
            "************************* IMPORTANT *************************\n"
            "-----BEGIN USER NKEY SEED-----\n"
            f"{user.seed}\n"
            "------END USER NKEY SEED------\n"
        )
