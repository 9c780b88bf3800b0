"""How a distributor checks credentials: password files and tokens."""

from __future__ import annotations

import base64
import json
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from pubsub_core.errors import BadOption
from pubsub_core.secrets import Secret
from pubsub_messagebus.protocol import Credentials
from pubsub_messagebus.server.authenticators import (
    JwtServerAuthenticator,
    PasswordFile,
    PasswordFileAuthenticator,
    Refused,
)

SECRET = "a shared secret of the tests, " * 3


def basic(username: str, password: str) -> Credentials:
    return Credentials("basic", username=username, password=Secret(password))


def token(text: str) -> Credentials:
    return Credentials("token", token=Secret(text))


# --- password files ------------------------------------------------------------------------


def test_the_originals_hashes_are_accepted(tmp_path: Path) -> None:
    salt = base64.b64encode(bytes(range(1, 33))).decode()
    assert salt == "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA="
    path = tmp_path / "passwords.json"
    path.write_text(json.dumps({"tom": {"Salt": salt, "Hash": "YeXM4onCRWcfSNbAFq0hRd1nGVI="}}))
    file = PasswordFile(path)
    assert file.verify("tom", "s3cret")
    assert not file.verify("tom", "s3cre")
    assert not file.verify("dick", "s3cret")


def test_added_users_get_a_slow_salted_hash(tmp_path: Path) -> None:
    path = tmp_path / "passwords.json"
    file = PasswordFile(path)
    file.add("tom", "pässword")
    file.add("dick", "pässword")
    entries = json.loads(path.read_text())
    assert entries["tom"]["Scheme"] == "scrypt"
    assert entries["tom"]["Salt"] != entries["dick"]["Salt"]
    assert entries["tom"]["Hash"] != entries["dick"]["Hash"]
    assert "pässword" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert file.verify("tom", "pässword")
    assert not file.verify("tom", "")
    assert file.remove("tom")
    assert not file.remove("tom")
    assert not file.verify("tom", "pässword")
    with pytest.raises(ValueError, match="';'"):
        file.add("a;b", "x")


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "passwords.json"
    PasswordFile(path).add("tom", "one")
    reader = PasswordFile(path)
    assert reader.verify("tom", "one")
    PasswordFile(path).add("tom", "two")
    assert not reader.verify("tom", "one")
    assert reader.verify("tom", "two")


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"Salt": "!", "Hash": "!"},
        {"Salt": 3, "Hash": 3},
        {"Salt": "", "Hash": "", "Scheme": "plain"},
        {"Salt": "", "Hash": "", "Scheme": "scrypt"},
        {"Salt": "", "Hash": "", "Scheme": "scrypt", "N": 2**30, "R": 8, "P": 1},
    ],
)
def test_a_damaged_entry_lets_nobody_in(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = tmp_path / "passwords.json"
    path.write_text(json.dumps({"tom": entry}))
    assert not PasswordFile(path).verify("tom", "")


async def test_the_authenticator_of_a_password_file(tmp_path: Path) -> None:
    path = tmp_path / "passwords.json"
    PasswordFile(path).add("tom", "right")
    authenticator = PasswordFileAuthenticator(path)
    user = await authenticator.authenticate(basic("tom", "right"))
    assert (user.name, user.method) == ("tom", "BASIC")
    for credentials in (basic("tom", "canary"), basic("dick", "canary")):
        with pytest.raises(Refused) as caught:
            await authenticator.authenticate(credentials)
        assert "canary" not in str(caught.value)
    with pytest.raises(BadOption, match="cannot be read"):
        await PasswordFileAuthenticator(tmp_path / "none").authenticate(basic("tom", "x"))


# --- tokens --------------------------------------------------------------------------------


def jwt_of(claims: dict[str, Any], key: Any = SECRET, algorithm: str | None = "HS256") -> str:
    jwt = pytest.importorskip("jwt", reason="PyJWT is not installed; extra messagebus-server")
    signed: str = jwt.encode(claims, key, algorithm=algorithm)
    return signed


async def test_a_signed_token_names_its_user() -> None:
    signed = jwt_of({"sub": "tom", "exp": time.time() + 60, "aud": "anybody", "iss": "x"})
    user = await JwtServerAuthenticator(SECRET).authenticate(token(signed))
    assert (user.name, user.method) == ("tom", "JWT")


async def test_what_is_no_good_token() -> None:
    soon = time.time() + 60
    for bad in (
        jwt_of({"sub": "tom", "exp": soon}, "another secret, also long enough, " * 3),
        jwt_of({"sub": "tom", "exp": soon}, None, None),
        jwt_of({"sub": "tom"}),
        jwt_of({"exp": soon}),
        jwt_of({"sub": "", "exp": soon}),
        jwt_of({"sub": "tom", "exp": soon, "nbf": soon + 1000}),
        jwt_of({"sub": "tom", "exp": soon}, SECRET, "HS512"),
        "no token",
        "",
    ):
        with pytest.raises(Refused) as caught:
            await JwtServerAuthenticator(SECRET).authenticate(token(bad))
        assert not bad or bad not in str(caught.value)


async def test_the_clocks_may_differ_a_little() -> None:
    expired = jwt_of({"sub": "tom", "exp": time.time() - 30})
    await JwtServerAuthenticator(SECRET).authenticate(token(expired))
    with pytest.raises(Refused, match="Expired"):
        await JwtServerAuthenticator(SECRET, leeway=10).authenticate(token(expired))


async def test_a_public_key_checks_rsa() -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    authenticator_of = JwtServerAuthenticator
    signed = jwt_of({"sub": "tom", "exp": time.time() + 60}, key, "RS256")
    authenticator = authenticator_of(public.decode(), algorithms=["RS256"])
    assert (await authenticator.authenticate(token(signed))).name == "tom"
    forged = jwt_of({"sub": "tom", "exp": time.time() + 60})
    with pytest.raises(Refused):
        await authenticator.authenticate(token(forged))


def test_dangerous_settings_are_refused() -> None:
    pytest.importorskip("jwt", reason="PyJWT is not installed; extra messagebus-server")
    unsafe: list[dict[str, Any]] = [
        {"key": "short"},
        {"key": SECRET, "algorithms": ["none"]},
        {"key": SECRET, "algorithms": []},
        {"key": SECRET, "algorithms": ["HS256", "RS256"]},
    ]
    for settings in unsafe:
        with pytest.raises(BadOption) as caught:
            JwtServerAuthenticator(**settings)
        assert "shared secret of" not in str(caught.value)
