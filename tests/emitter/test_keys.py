"""Licenses and keys, judged by what the Go broker made and accepted."""

from __future__ import annotations

import base64
import random
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_emitter.keys import (
    EPOCH,
    InvalidKey,
    InvalidLicense,
    InvalidTarget,
    Key,
    License,
    Permission,
    TargetTooLong,
    encode_target,
    hash_text,
    is_useless_target,
    target_allows,
)
from tests.emitter.vectors import KEYS, LICENSE, MASTER_KEY, VECTORS

ours = License.parse(LICENSE)


# --- vectors ---------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["hash"], ids=lambda v: repr(v["input"]))
def test_the_hash_is_the_brokers(vector: dict[str, Any]) -> None:
    assert hash_text(vector["input"]) == vector["dec"]
    assert f"{hash_text(vector['input']):08x}" == vector["hex"]


def test_a_long_text_hashes_like_a_short_one() -> None:
    # Kept results and fresh ones take two ways.
    text = "x" * 1000
    assert hash_text(text) == hash_text(text)
    assert hash_text(text) != hash_text(text[:-1])


@pytest.mark.parametrize("vector", VECTORS["license"], ids=lambda v: v["license"][:8])
def test_a_license_of_each_version_is_read(vector: dict[str, Any]) -> None:
    license_ = License.parse(vector["license"])
    assert license_.version == vector["version"]
    assert license_.contract == vector["contract"]
    assert license_.signature == vector["signature"]
    assert license_.master == vector["master_index"]
    assert license_.cipher_key.hex() == vector["key_hex"]
    if "nonce_hex" in vector:
        assert license_.nonce.hex() == vector["nonce_hex"]
    if "type" in vector:
        assert (license_.kind, license_.expires) == (vector["type"], vector["expires_unix"])
    assert License.parse(license_.text) == license_


@pytest.mark.parametrize("vector", VECTORS["license"], ids=lambda v: v["license"][:8])
def test_a_license_is_written_as_the_broker_writes_it(vector: dict[str, Any]) -> None:
    text = vector["license"]
    suffix = "" if ":" in text else ":1"
    assert License.parse(text).text == text + suffix


@pytest.mark.parametrize("vector", VECTORS["cipher"], ids=lambda v: v["cipher"])
def test_the_ciphers_give_the_bytes_of_the_go_tests(vector: dict[str, Any]) -> None:
    version: Literal[2, 3] = 2 if "xsalsa20" in vector["cipher"] else 3
    license_ = License(
        version, 123, 777, bytes.fromhex(vector["key_hex"]), bytes.fromhex(vector["nonce_hex"])
    )
    key = Key.from_bytes(bytes.fromhex(vector["plain_hex"]))
    assert license_.encrypt(key) == vector["encoded"]
    assert license_.decrypt(vector["encoded"]) == key


@pytest.mark.parametrize("vector", VECTORS["key_decode"], ids=lambda v: v["note"])
def test_a_key_says_what_the_broker_reads_in_it(vector: dict[str, Any]) -> None:
    license_ = License.parse(vector["license"])
    key = license_.decrypt(vector["key"])
    assert key.to_bytes().hex() == vector["plain_hex"]
    assert key.salt == vector["salt"]
    assert key.master == vector["master"]
    assert key.contract == vector["contract"]
    assert key.signature == vector["signature"]
    assert f"{key.path:06x}" == vector["path_hex"]
    assert int(key.permissions) == vector["permissions"]
    assert f"{key.target:08x}" == vector["target_hash_hex"]
    assert key.expires == vector["expires_unix"]
    assert license_.encrypt(key) == vector["key"]


@pytest.mark.parametrize("vector", VECTORS["key_invalid"], ids=lambda v: v["why"])
def test_what_is_no_key_is_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(InvalidKey):
        ours.decrypt(vector["key"])


@pytest.mark.parametrize("vector", VECTORS["key_target"], ids=lambda v: v["target"])
def test_a_target_becomes_path_and_hash(vector: dict[str, Any]) -> None:
    target = vector["target"]
    if "error" in vector:
        expected = TargetTooLong if "23" in vector["error"] else InvalidTarget
        with pytest.raises(expected) as caught:
            encode_target(target)
        assert type(caught.value) is expected
        return
    path, hashed = encode_target(target)
    assert (f"{path:06x}", f"{hashed:08x}") == (vector["path_hex"], vector["hash_hex"])


@pytest.mark.parametrize(("target", "channel", "allowed"), VECTORS["key_validate"], ids=str)
def test_a_key_covers_the_channels_the_broker_says(
    target: str, channel: str, allowed: bool
) -> None:
    assert target_allows(*encode_target(target), channel) is allowed


def test_a_target_called_useless_covers_nothing_and_the_others_something() -> None:
    covered: dict[str, bool] = defaultdict(bool)
    for target, _, allowed in VECTORS["key_validate"]:
        covered[target] |= allowed
    assert {target: is_useless_target(target) for target in covered} == {
        # "+/#/" covers channels whose first segment is literally "+", which nobody has.
        target: not found or target == "+/#/"
        for target, found in covered.items()
    }


@pytest.mark.parametrize("vector", VECTORS["extend"], ids=lambda v: v["request_channel"])
def test_an_extended_key_is_byte_for_byte_the_brokers(vector: dict[str, Any]) -> None:
    license_ = License.parse(vector["license"])
    parent = license_.decrypt(vector["parent_key"])
    assert int(parent.permissions) == vector["parent_permissions"]
    child = parent.extended(vector["result_channel"], vector["request_type"], 0, time.time())
    assert child.to_bytes().hex() == vector["result_plain_hex"]
    assert int(child.permissions) == vector["result_permissions"]
    assert license_.encrypt(child) == vector["result_key"]


def test_the_fixture_keys_mean_what_their_names_say() -> None:
    for name, text in KEYS.items():
        target, _, letters = name.partition(" ")
        key = ours.decrypt(text)
        assert ours.owns(key)
        assert (key.path, key.target) == encode_target(target)
        assert key.permissions == Permission.parse(letters if letters.isalpha() else "") or (
            "expired" in name and key.permissions == Permission.parse("rw")
        )
        assert key.is_expired(time.time()) is ("expired" in name)
    assert ours.decrypt(MASTER_KEY).is_master


# --- making keys -----------------------------------------------------------------------

licenses = st.one_of(
    st.builds(
        License,
        st.just(1),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
        st.binary(min_size=16, max_size=16),
    ),
    st.builds(
        License,
        st.just(2),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
        st.binary(min_size=32, max_size=32),
        st.binary(min_size=24, max_size=24),
    ),
    st.builds(
        License,
        st.just(3),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
        st.binary(min_size=32, max_size=32),
        st.binary(min_size=16, max_size=16),
    ),
)


@given(license_=licenses, data=st.binary(min_size=24, max_size=24))
def test_every_key_survives_encryption(license_: License, data: bytes) -> None:
    key = Key.from_bytes(data)
    text = license_.encrypt(key)
    assert len(text) == 32
    assert license_.decrypt(text) == key
    assert License.parse(license_.text).decrypt(text) == key


@given(st.text(max_size=80))
def test_any_text_is_a_license_or_refused(text: str) -> None:
    try:
        License.parse(text)
    except InvalidLicense:
        return


@given(st.binary(max_size=120), st.sampled_from(["", ":1", ":2", ":3", ":4"]))
def test_any_bytes_are_a_license_or_refused(data: bytes, suffix: str) -> None:
    import base64

    try:
        License.parse(base64.urlsafe_b64encode(data).decode().rstrip("=") + suffix)
    except InvalidLicense:
        return


def test_a_compressed_license_is_read() -> None:
    # A cipher key of zeros: one literal byte, then copies of every kind that Snappy has.
    import base64

    plain = bytes([32]) + bytes(32) + bytes([16]) + bytes(range(16)) + bytes([1, 2, 1])
    block = bytearray([len(plain), 1 << 2, 32, 0])  # literal: 32, 0
    block += bytes([(7 << 2) | 1, 1])  # 11 bytes back 1
    block += bytes([(9 << 2) | 2, 1, 0])  # 10 bytes back 1
    block += bytes([(9 << 2) | 3, 1, 0, 0, 0])  # 10 bytes back 1
    block += bytes([19 << 2]) + plain[33:]
    text = base64.urlsafe_b64encode(bytes(block)).decode().rstrip("=") + ":3"
    found = License.parse(text)
    assert (found.cipher_key, found.nonce) == (bytes(32), bytes(range(16)))
    assert (found.contract, found.signature, found.master) == (1, 2, 1)


def test_new_licenses_and_keys_differ() -> None:
    assert License.generate() != License.generate()
    assert len({ours.make_key("a/", "rw") for _ in range(50)}) > 40


def test_a_key_made_here_decodes_to_what_was_asked_for() -> None:
    key = ours.decrypt(ours.make_key("a/+/c/", "rwp", ttl=60, now=EPOCH + 1000.7))
    assert (key.path, key.target) == encode_target("a/+/c/")
    assert key.permissions.letters == "rwp"
    assert key.expires == EPOCH + 1060
    assert not key.is_expired(EPOCH + 1060)
    assert key.is_expired(EPOCH + 1060.5)
    assert ours.owns(key)


def test_a_negative_time_to_live_has_passed_already() -> None:
    assert ours.decrypt(ours.make_key("a/", "r", ttl=-1)).is_expired(time.time())


def test_a_master_key_is_nothing_but_that() -> None:
    key = ours.decrypt(ours.make_master_key())
    assert key.is_master
    assert ours.owns(key)
    assert not replace(key, permissions=Permission(0x03)).is_master


def test_permission_letters_ignore_order_repetition_and_unknown_ones() -> None:
    assert Permission.parse("wrrq?") == Permission.READ | Permission.WRITE
    assert Permission.parse("") == Permission.NONE
    assert Permission.parse("xeplswr").letters == "rwslpex"


# --- altered keys ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_keys_belong_to_no_license(count: int) -> None:
    source = random.Random(7)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for _ in range(count):
        assert not ours.owns(ours.decrypt("".join(source.choices(alphabet, k=32))))


@pytest.mark.parametrize("text", [LICENSE, VECTORS["license"][3]["license"]])
def test_a_key_altered_in_contract_or_signature_is_no_longer_ours(text: str) -> None:
    license_ = License.parse(text)
    for place in range(4, 12):
        assert not license_.owns(_altered(license_, license_.make_key("a/#/", "r"), place, 1))


def test_a_key_with_an_altered_salt_is_no_longer_ours() -> None:
    # Version 3 derives its stream from the salt. In version 2 the salt protects nothing.
    for place in (0, 1):
        assert not ours.owns(_altered(ours, ours.make_key("a/#/", "r"), place, 1))


@pytest.mark.parametrize("text", [LICENSE, VECTORS["license"][3]["license"]])
def test_permission_and_expiry_bits_can_be_altered_unnoticed(text: str) -> None:
    """A property of the format, on every broker: nothing authenticates the stream cipher."""
    license_ = License.parse(text)
    key = license_.make_key("a/#/", "r", ttl=60)
    more = _altered(license_, key, 15, int(Permission.WRITE))
    assert license_.owns(more)
    assert more.permissions.letters == "rw"
    later = _altered(license_, key, 20, 0x40)
    assert license_.owns(later)
    assert later.expires > license_.decrypt(key).expires


@pytest.mark.parametrize("text", [LICENSE, VECTORS["license"][3]["license"]])
def test_whoever_knows_what_a_key_says_can_make_it_say_anything_else(text: str) -> None:
    """As above; the README must not promise more."""
    license_ = License.parse(text)
    key = license_.make_key("a/#/", "r")
    master = _altered(license_, key, 15, int(Permission.READ | Permission.MASTER))
    assert license_.owns(master)
    assert master.is_master
    (path, target), (known_path, known) = encode_target("other/b/"), encode_target("a/#/")
    data = bytearray(base64.urlsafe_b64decode(key))
    change = (path ^ known_path) << 40 | (target ^ known)
    for place, bits in enumerate(change.to_bytes(8, "big"), start=12):
        data[place] ^= bits
    moved = license_.decrypt(base64.urlsafe_b64encode(data).decode())
    assert license_.owns(moved)
    assert moved.allows("other/b/")
    assert not moved.allows("a/")


def test_version_1_is_a_block_cipher_where_an_altered_bit_spoils_eight_bytes() -> None:
    license_ = License.parse(VECTORS["license"][0]["license"])
    key = license_.make_key("a/#/", "r")
    changed = _altered(license_, key, 15, int(Permission.WRITE))
    assert changed.permissions.letters != "rw" or changed.signature != license_.signature


def _altered(license_: License, text: str, place: int, bits: int) -> Key:
    data = bytearray(base64.urlsafe_b64decode(text))
    data[place] ^= bits
    return license_.decrypt(base64.urlsafe_b64encode(bytes(data)).decode())


# --- secrets ---------------------------------------------------------------------------


def test_no_text_of_a_license_or_its_errors_shows_it() -> None:
    assert ours.cipher_key.hex() not in repr(ours)
    assert str(ours.cipher_key) not in repr(ours)
    assert str(ours.nonce) not in repr(ours)
    for bad in (LICENSE[:-20] + ":3", LICENSE.replace(":3", ":9"), LICENSE[1:]):
        with pytest.raises(InvalidLicense) as caught:
            License.parse(bad)
        assert bad[:20] not in str(caught.value)
        assert caught.value.__cause__ is None
    with pytest.raises(InvalidKey) as refused:
        ours.decrypt(MASTER_KEY + "x")
    assert MASTER_KEY not in str(refused.value)
