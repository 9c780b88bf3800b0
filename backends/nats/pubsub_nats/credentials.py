"""Who we are, as fields of CONNECT: six kinds of credentials, one of which TLS carries alone.

The file of credentials is read again for each attempt to connect, since its JWT expires and is
replaced by another. Signing needs the package ``nkeys``, which is imported only then.

Sources: docs.nats.io, "Authentication"; NATS ADR-14; nats-server 2.15.1 took what this makes.
"""

from __future__ import annotations

import base64
import importlib
import re
from pathlib import Path
from typing import Any

from pubsub_core.errors import AuthenticationFailed, BadOption, MissingDependency
from pubsub_core.interfaces import Address

from .options import NatsOptions

__all__ = ["connect_fields"]

_INSTALL = "pip install 'pubsub-core[nats]'"
_BLOCK = re.compile(r"-----BEGIN ([A-Z ]+)-----\s*(\S+)\s*-+END \1-+")


def connect_fields(options: NatsOptions, address: Address, nonce: str) -> dict[str, str]:
    """Return the fields of CONNECT that say who we are. Reads files: call it in a thread.

    Args:
        options: Say more than *address*, and win over it.
        address: With the user name and the password of the URL.
        nonce: What the server wants signed; empty where it knows no keys.

    Raises:
        BadOption: A file or a seed cannot be used.
        MissingDependency: Signing needs ``nkeys``.
        AuthenticationFailed: The server cannot check a signature.
    """
    if options.credentials is not None:
        jwt, seed = _credentials(options.credentials)
        return {"jwt": jwt, **_signed(seed, nonce, "credentials", public=False)}
    if options.nkey_seed is not None:
        return _signed(options.nkey_seed.reveal(), nonce, "nkey_seed", public=True)
    if options.token is not None:
        return {"auth_token": options.token.reveal()}
    username = options.username if options.username is not None else address.username
    password = options.password if options.password is not None else address.password
    if username is None:
        return {}
    if password is None and options.username is None:
        return {"auth_token": username}
    return {"user": username, "pass": "" if password is None else password.reveal()}


def _credentials(path: str) -> tuple[str, str]:
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise BadOption(
            f"the credentials in {path!r} cannot be read: {why}",
            option="credentials",
            hint="name a .creds file that this process may read",
            backend="nats",
        ) from None
    blocks = dict(_BLOCK.findall(text))
    jwt = blocks.get("NATS USER JWT")
    seed = blocks.get("USER NKEY SEED")
    if jwt is None or seed is None:
        raise BadOption(
            f"{path!r} holds no user's JWT with its seed",
            option="credentials",
            hint="make the file with `nsc generate creds`",
            backend="nats",
        )
    return jwt, seed


def _signed(seed: str, nonce: str, option: str, *, public: bool) -> dict[str, str]:
    try:
        # Without type information; and it may be missing.
        nkeys: Any = importlib.import_module("nkeys")
    except ImportError as error:
        raise MissingDependency(
            f"signing with a key of NATS cannot import {error.name or 'nkeys'!r}",
            hint=_INSTALL,
            backend="nats",
        ) from error
    try:
        pair = nkeys.from_seed(bytearray(seed.strip().encode()))
        key: str = pair.public_key.decode()
    except Exception:  # noqa: BLE001 - the library raises what its decoders raise
        # Neither the seed nor the library's error, which may quote it.
        raise BadOption(
            "what stands for the user's seed is none",
            option=option,
            hint="a user's seed begins with SU and has 58 characters",
            backend="nats",
        ) from None
    if not nonce:
        raise AuthenticationFailed(
            "the server sends no nonce to sign, so it knows no keys",
            hint="configure nkeys or JWTs at the server, or log in with a password or a token",
            backend="nats",
        )
    signature = base64.urlsafe_b64encode(pair.sign(nonce.encode())).rstrip(b"=").decode()
    return {"nkey": key, "sig": signature} if public else {"sig": signature}
