"""Both forms of the handshake, from either side, and what a server makes of a bad one."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_messagebus.protocol import (
    Credentials,
    HandshakeDecoder,
    HandshakeForm,
    ProtocolError,
    Truncated,
    basic_handshake,
    encode_string,
    token_handshake,
)
from tests.messagebus.vectors import HANDSHAKES, MALFORMED_HANDSHAKES

FORMS: dict[str, HandshakeForm] = {
    "v3-strings": "strings",
    "v4-connection-string": "connection-string",
}
KINDS = ("null", "basic", "token")  # SSPI is another protocol around this one
CHOSEN = [vector for vector in HANDSHAKES if vector["authenticator"] in KINDS]


def read(
    wire: bytes, method: Any, form: Any = "auto", *, step: int = 1 << 30
) -> tuple[Credentials | None, bytes]:
    decoder = HandshakeDecoder(method, form=form)
    for at in range(0, len(wire), step):
        decoder.feed(wire[at : at + step])
        found = decoder.next_credentials()
        if found is not None:
            return found, decoder.rest + wire[at + step :]
    return None, b""


def cannot_be_carried(vector: dict[str, Any]) -> bool:
    return ";" in vector["fields"].get("password", "") and vector["handshake"] != "v3-strings"


@pytest.mark.parametrize("vector", CHOSEN, ids=lambda vector: vector["id"])
def test_client_sends_the_recorded_bytes(vector: dict[str, Any]) -> None:
    makers: dict[str, Any] = {"basic": basic_handshake, "token": token_handshake}
    make = makers.get(vector["authenticator"])
    if make is None:
        assert vector["hex"] == ""
        return
    form = FORMS[vector["handshake"]]
    if cannot_be_carried(vector):
        with pytest.raises(ValueError, match="cannot carry"):
            make(**vector["fields"], form=form)
        return
    assert make(**vector["fields"], form=form).hex() == vector["hex"]


@pytest.mark.parametrize(
    "vector",
    [
        vector
        for vector in CHOSEN
        if vector["authenticator"] != "null" and not cannot_be_carried(vector)
    ],
    ids=lambda vector: vector["id"],
)
def test_server_reads_the_recorded_bytes(vector: dict[str, Any]) -> None:
    for step in (1, 3, 1 << 30):
        for form in ("auto", "its own"):
            _check_reading(vector, form, step)


def _check_reading(vector: dict[str, Any], form: str, step: int) -> None:
    fields: dict[str, str] = vector["fields"]
    wire = bytes.fromhex(vector["hex"])
    chosen = "auto" if form == "auto" else FORMS[vector["handshake"]]
    found, rest = read(wire + b"\x04next", vector["authenticator"], chosen, step=step)
    assert rest == b"\x04next"
    assert found is not None
    assert found.username == fields.get("username", "")
    assert found.password.reveal() == fields.get("password", "")
    assert found.token.reveal() == fields.get("token", "")
    assert found.impersonating == fields.get("impersonating", "")
    assert found.forwarded_for == fields.get("forwarded_for", "")
    assert found.application == fields.get("application", "unspecified")


@pytest.mark.parametrize("step", [1, 1 << 30])
@pytest.mark.parametrize("vector", MALFORMED_HANDSHAKES, ids=lambda vector: vector["id"])
def test_malformed(vector: dict[str, Any], step: int) -> None:
    wire = bytes.fromhex(vector["hex"])
    if "wrong-password" in vector["id"]:
        # Well-formed; who checks passwords refuses it.
        found, _ = read(wire, "basic", step=step)
        assert found is not None
        assert found.username == "sub"
    elif "accept" in vector["server"]:
        found, _ = read(wire, "basic", step=step)
        assert found is not None
        assert (found.username, found.password.reveal()) == ("sub", "pw")
    else:
        decoder = HandshakeDecoder("basic")
        decoder.feed(wire)
        if vector["id"] in ("basic-garbage", "basic-lowercase-keys", "basic-truncated"):
            # It may be the name of a user of 3.0: wait, until the deadline or the end.
            assert decoder.next_credentials() is None
            decoder.eof()
            with pytest.raises(Truncated):
                decoder.next_credentials()
        else:
            for _ in range(2):
                with pytest.raises(ProtocolError):
                    decoder.next_credentials()


@pytest.mark.parametrize("wire", ["basic-garbage", "basic-lowercase-keys", "basic-empty-string"])
def test_only_connection_strings(wire: str) -> None:
    vector = next(each for each in MALFORMED_HANDSHAKES if each["id"] == wire)
    decoder = HandshakeDecoder("basic", form="connection-string")
    decoder.feed(bytes.fromhex(vector["hex"]))
    with pytest.raises(ProtocolError):
        decoder.next_credentials()


def test_without_authentication_one_empty_string_is_passed_over() -> None:
    for step in (1, 2, 1 << 30):
        found, rest = read(bytes(4) + b"\x05rest", "null", step=step)
        assert found == Credentials("null")
        assert rest == b"\x05rest"
        found, rest = read(b"\x05rest", "null", step=step)
        assert found == Credentials("null")
        assert rest == b"\x05rest"
    # Only one; and only a whole one.
    assert read(bytes(8), "null")[1] == bytes(4)
    assert read(b"\0\0\0\x05", "null")[1] == b"\0\0\0\x05"
    assert read(b"\0\0\0", "null")[0] is None


def test_blank_is_absent() -> None:
    for wire in (
        basic_handshake("tom", "pw", " ", "\t"),
        encode_string("Username=tom;Password=pw;Impersonating= ;ForwardedFor=\t;Application= "),
    ):
        found, _ = read(wire, "basic")
        assert found is not None
        assert (found.impersonating, found.forwarded_for) == ("", "")
        assert found.application == "unspecified"


def test_application_chooses_the_form() -> None:
    assert b"Application=app" in basic_handshake("tom", "pw", application="app")
    assert b"Application=app" in token_handshake("aaa", application="app")
    with pytest.raises(ValueError, match="connection-string"):
        basic_handshake("tom", "pw", application="app", form="strings")
    with pytest.raises(ValueError, match="handshake="):
        basic_handshake("tom", "pw", form="both")  # type: ignore[arg-type]  # that is the test


def test_no_secret_is_shown() -> None:
    found, _ = read(basic_handshake("tom", "canary"), "basic")
    assert "canary" not in repr(found)
    found, _ = read(token_handshake("canary"), "token")
    assert "canary" not in repr(found)
    decoder = HandshakeDecoder("basic")
    decoder.feed(encode_string("Username=tom;Password=canary;canary;canary=1"))
    with pytest.raises(ProtocolError) as caught:
        decoder.next_credentials()
    assert "canary" not in str(caught.value)


def test_all_strings_together_are_bounded() -> None:
    half = encode_string("x" * 40_000)
    decoder = HandshakeDecoder("basic")
    decoder.feed(half)
    assert decoder.next_credentials() is None
    # Refused on its length, before its bytes.
    decoder.feed(half[:4])
    with pytest.raises(ProtocolError, match="all together"):
        decoder.next_credentials()


@pytest.mark.parametrize("step", [1, 7, 1 << 30])
def test_a_package_that_counts_characters_can_log_in_where_that_is_chosen(step: int) -> None:
    texts = ("Jürgen", "pässwört€🐍", "", "")
    wire = b"".join(len(text).to_bytes(4, "big") + text.encode() for text in texts)
    decoder = HandshakeDecoder("basic", string_length_unit="codepoints")
    found = None
    for at in range(0, len(wire + b"\x04"), step):
        assert found is None
        decoder.feed((wire + b"\x04")[at : at + step])
        found = decoder.next_credentials()
        if found is not None:
            break
    assert found is not None
    assert (found.username, found.password.reveal()) == texts[:2]


words = st.text(st.characters(exclude_characters=";=", exclude_categories=["Cs"]), max_size=8)


@given(words.filter(bool), words, words, words, st.sampled_from(["strings", "connection-string"]))
def test_any_credentials_arrive(
    username: str, password: str, impersonating: str, forwarded_for: str, form: HandshakeForm
) -> None:
    wire = basic_handshake(username, password, impersonating, forwarded_for, form=form)
    found, rest = read(wire, "basic", step=5)
    assert found is not None
    assert not rest
    assert (found.username, found.password.reveal()) == (username, password)
    assert found.impersonating == (impersonating if impersonating.strip() else "")
    assert found.forwarded_for == (forwarded_for if forwarded_for.strip() else "")


@given(st.binary(max_size=80), st.sampled_from(["null", "basic", "token"]))
def test_any_bytes_are_credentials_or_one_error(data: bytes, method: Any) -> None:
    decoder = HandshakeDecoder(method)
    decoder.feed(data)
    decoder.eof()
    with contextlib.suppress(ProtocolError):
        decoder.next_credentials()
