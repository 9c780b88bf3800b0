"""Licenses and keys of an Emitter broker, read and made in pure Python.

A *license* is the secret of a broker: the cipher key that all its keys are encrypted with, and
its contract. A *key* is 24 bytes, encrypted, that say which channels may be used for what.
The holder of the license can make keys without asking the broker:

>>> license = License.generate()
>>> key = license.make_key("demo/#/", "rw")
>>> license.decrypt(key).allows("demo/room/")
True

Versions 2 and 3 of a license XOR the key with a stream, without authentication. Somebody who has
a key and knows its content can therefore change it to anything else unnoticed: permissions,
expiry and channel, and it can become a master key. That is a property of the format, on every
broker. Only contract and signature must stay as they are, so keys of another license, or made up
ones, are refused.

Nothing here prints a secret: the repr of a `License` has no key material.

Sources: emitter-io/emitter, ``internal/security/key.go``, ``internal/security/cipher``,
``internal/security/hash/murmur.go`` and ``internal/security/license``; D. J. Bernstein, *The
Salsa20 family of stream ciphers* and *Extending the Salsa20 nonce*; Google's Snappy
``format_description.txt``.
"""

from __future__ import annotations

import base64
import binascii
import enum
import re
import secrets
import struct
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final, Literal

from pubsub_mqtt.packets import encode_length  # licenses and Snappy have MQTT's integers

__all__ = [
    "EPOCH",
    "KEY_LENGTH",
    "MAX_PARTS",
    "InvalidKey",
    "InvalidLicense",
    "InvalidTarget",
    "Key",
    "License",
    "Permission",
    "TargetTooLong",
    "encode_target",
    "hash_text",
    "is_useless_target",
    "target_allows",
]

EPOCH: Final = 1_262_304_000
"""2010-01-01 00:00 UTC in unix seconds: where the expiry of keys and licenses counts from."""

KEY_LENGTH: Final = 32
"""Characters of a key."""

MAX_PARTS: Final = 23
"""Most parts of a key's target channel."""

_KEY_BYTES: Final = 24
_FIELDS: Final = struct.Struct(">HHII4sII")
_WORDS_3X2: Final = struct.Struct(">6I")
_SALSA_WORDS: Final = struct.Struct("<16I")
_MASK: Final = 0xFFFF_FFFF
_STRICT: Final = 0x80_0000
_MAX_SALT: Final = 32766
_MASTER: Final = 1  # brokers accept the first master key of a license only
_KEPT: Final = 16384
_KEPT_LENGTH: Final = 128  # results for longer texts, which a peer may invent, are not kept
_MAX_LICENSE_BYTES: Final = 4096
_ALPHABET: Final = re.compile(r"[A-Za-z0-9_-]{32}", re.ASCII)

Version = Literal[1, 2, 3]


class InvalidKey(ValueError):
    """The text is no key of this license, as far as can be told. It is not in the message."""


class InvalidLicense(ValueError):
    """The text is no license. It is not in the message."""


class InvalidTarget(ValueError):
    """A key cannot be made for that channel: it does not end with a slash."""


class TargetTooLong(InvalidTarget):
    """A key cannot be made for that channel: it has more than `MAX_PARTS` parts."""


class Permission(enum.IntFlag):
    """The operations that a key allows. A master key is one that has `MASTER` and nothing else."""

    NONE = 0
    MASTER = 0x01
    """Create and ban keys."""
    READ = 0x02
    """Subscribe and unsubscribe."""
    WRITE = 0x04
    """Publish, also as last will."""
    STORE = 0x08
    """Without it ``ttl`` and retain have no effect."""
    LOAD = 0x10
    """Read what is stored."""
    PRESENCE = 0x20
    """Ask who is subscribed."""
    EXTEND = 0x40
    """Make private channels; such a key can do nothing else."""
    EXECUTE = 0x80
    """Reserved; has no effect."""

    @classmethod
    def parse(cls, letters: str) -> Permission:
        """Return the permissions that *letters* name; brokers ignore unknown ones, and so do we.

        >>> Permission.parse("rw") == Permission.READ | Permission.WRITE
        True
        """
        found = cls.NONE
        for letter in letters:
            found |= _LETTERS.get(letter, cls.NONE)
        return found

    @property
    def letters(self) -> str:
        """The letters that stand for these permissions; the master bit has none."""
        return "".join(letter for letter, bit in _LETTERS.items() if self & bit)


_LETTERS: Final = {
    "r": Permission.READ,
    "w": Permission.WRITE,
    "s": Permission.STORE,
    "l": Permission.LOAD,
    "p": Permission.PRESENCE,
    "e": Permission.EXTEND,
    "x": Permission.EXECUTE,
}


# --- hashing ---------------------------------------------------------------------------


def hash_text(text: str) -> int:
    """Return Emitter's hash of a channel's segment, or of a whole target.

    MurmurHash3 (x86, 32 bits) with seed 37, its four bytes reversed.

    >>> f"{hash_text('a'):08x}"
    'c103eab3'
    """
    return _murmur(text) if len(text) > _KEPT_LENGTH else _murmur_kept(text)


def _murmur(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    value = 37
    whole = len(data) & ~3
    for (word,) in struct.iter_unpack("<I", data[:whole]):
        value ^= _scramble(word)
        value = (value << 13 | value >> 19) & _MASK
        value = (value * 5 + 0xE654_6B64) & _MASK
    value ^= _scramble(int.from_bytes(data[whole:], "little"))
    value ^= len(data)
    value ^= value >> 16
    value = value * 0x85EB_CA6B & _MASK
    value ^= value >> 13
    value = value * 0xC2B2_AE35 & _MASK
    value ^= value >> 16
    return int.from_bytes(value.to_bytes(4, "little"), "big")


_murmur_kept = lru_cache(maxsize=_KEPT)(_murmur)


def _scramble(word: int) -> int:
    word = word * 0xCC9E_2D51 & _MASK
    word = (word << 15 | word >> 17) & _MASK
    return word * 0x1B87_3593 & _MASK


# --- targets ---------------------------------------------------------------------------


def encode_target(channel: str) -> tuple[int, int]:
    """Return path and hash of the channel that a key is made for.

    The path has one bit per literal part, from bit 22 downwards; bit 23 says that no deeper
    channel is meant. Only the final slash and the number of parts are checked, as brokers
    do: characters that no channel can have give a key that allows nothing.

    Raises:
        InvalidTarget: It does not end with ``/`` (``a/b/`` for that channel, ``a/b/#/``
            for those below, too).
        TargetTooLong: It has more than 23 parts.
    """
    if not channel.endswith("/"):
        raise InvalidTarget(
            "a key's channel must end with '/', or with '/#/' for everything below it, too"
        )
    parts = channel.rstrip("/").split("/")
    path = _STRICT
    if parts[-1] == "#":
        parts.pop()
        path = 0
    if len(parts) > MAX_PARTS:
        raise TargetTooLong(f"a key's channel with {len(parts)} parts; it can have {MAX_PARTS}")
    for index, part in enumerate(parts):
        if part not in ("+", "#"):
            path |= 1 << (22 - index)
    return path, hash_text("/".join(parts))


def is_useless_target(channel: str) -> bool:
    """Whether a key for *channel* would allow nothing, although it can be made.

    That is so where ``+`` comes last after a literal part (``a/+/``), and where only ``+``
    stand before a final ``#`` (``+/#/``).
    """
    parts = channel.rstrip("/").split("/")
    if parts == ["#"]:
        return False
    if parts[-1] == "#":
        return parts[-2] == "+"
    return parts[-1] == "+" and any(part != "+" for part in parts)


def target_allows(path: int, target: int, channel: str) -> bool:
    """Whether a key with that path and hash covers *channel*, which may have wildcards.

    This is the rule of the Go broker with its oddities, since keys are carried from one
    broker to another: a key for ``a/`` also covers the subscription ``a/#/``; a literal part
    refuses ``+``; a target that ends with ``+`` after a literal part covers nothing.
    """
    if len(channel) > _KEPT_LENGTH:
        return _allows(path, target, channel)
    return _allows_kept(path, target, channel)


def _allows(path: int, target: int, channel: str) -> bool:
    parts = channel.removesuffix("/").split("/")
    if path == 0:  # for everything, or of a broker before paths, which knew the first part only
        return target == _HASH_OF_NOTHING or target == hash_text(parts[0])
    if parts[-1] == "#":
        parts.pop()
    lowest = (path & -path).bit_length() - 1
    depth = 23 - lowest if lowest < 23 else len(parts)
    if len(parts) < depth or (path & _STRICT and len(parts) != depth):
        return False
    for index, part in enumerate(parts):
        if index < MAX_PARTS and path >> (22 - index) & 1:
            if part == "+":
                return False
        else:
            parts[index] = "+"
    return hash_text("/".join(parts[:depth])) == target


_allows_kept = lru_cache(maxsize=_KEPT)(_allows)
_HASH_OF_NOTHING: Final = hash_text("")


# --- ciphers ---------------------------------------------------------------------------


def _xtea(data: bytes, cipher_key: bytes, *, encrypt: bool) -> bytes:
    """XTEA with 32 cycles over each of three blocks (version 1)."""
    keys = struct.unpack(">4I", cipher_key)
    words = list(_WORDS_3X2.unpack(data))
    for block in (0, 2, 4):
        left, right = words[block], words[block + 1]
        if encrypt:
            total = 0
            for _ in range(32):
                mixed = ((right << 4 ^ right >> 5) + right) ^ (total + keys[total & 3])
                left = (left + mixed) & _MASK
                total = (total + 0x9E37_79B9) & _MASK
                mixed = ((left << 4 ^ left >> 5) + left) ^ (total + keys[total >> 11 & 3])
                right = (right + mixed) & _MASK
        else:
            total = 0xC6EF_3720
            for _ in range(32):
                mixed = ((left << 4 ^ left >> 5) + left) ^ (total + keys[total >> 11 & 3])
                right = (right - mixed) & _MASK
                total = (total - 0x9E37_79B9) & _MASK
                mixed = ((right << 4 ^ right >> 5) + right) ^ (total + keys[total & 3])
                left = (left - mixed) & _MASK
        words[block], words[block + 1] = left, right
    return _WORDS_3X2.pack(*words)


def _whiten(data: bytes) -> bytes:
    """XOR every later pair of bytes with the first pair, which is the salt."""
    return data[:2] + _xor(data[2:], data[:2] * 11)


def _xor(data: bytes, stream: bytes) -> bytes:
    size = len(data)
    mixed = int.from_bytes(data, "big") ^ int.from_bytes(stream[:size], "big")
    return mixed.to_bytes(size, "big")


# Where the constant, the key and the input stand in a block of 16 words.
_SIGMA: Final = struct.unpack("<4I", b"expand 32-byte k")
_ROUND: Final = (
    (0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11),
    (0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14),
)  # fmt: skip


def _block(cipher_key: bytes, given: bytes) -> tuple[list[int], list[int]]:
    """Return the 16 words that Salsa20 starts from, and the result of 20 rounds."""
    k = struct.unpack("<8I", cipher_key)
    n = struct.unpack("<4I", given)
    s = _SIGMA
    start = [s[0], *k[:4], s[1], *n, s[2], *k[4:], s[3]]
    x = list(start)
    for _ in range(10):
        for a, b, c, d in _ROUND:
            t = x[a] + x[d] & _MASK
            x[b] ^= (t << 7 | t >> 25) & _MASK
            t = x[b] + x[a] & _MASK
            x[c] ^= (t << 9 | t >> 23) & _MASK
            t = x[c] + x[b] & _MASK
            x[d] ^= (t << 13 | t >> 19) & _MASK
            t = x[d] + x[c] & _MASK
            x[a] ^= (t << 18 | t >> 14) & _MASK
    return start, x


def _hsalsa20(cipher_key: bytes, given: bytes) -> bytes:
    _, x = _block(cipher_key, given)
    return struct.pack("<8I", *(x[index] for index in (0, 5, 10, 15, 6, 7, 8, 9)))


def _salsa20(cipher_key: bytes, given: bytes) -> bytes:
    start, x = _block(cipher_key, given)
    return _SALSA_WORDS.pack(*(a + b & _MASK for a, b in zip(start, x, strict=True)))


# --- keys ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Key:
    """A decrypted key. It is worth nothing without the license it belongs to.

    Attributes:
        salt: Two random bytes, so that equal keys look different.
        master: Which master key of the contract made it; 1 for those of a license.
        contract: The tenant; messages of different contracts never meet.
        signature: The license's, where it was made with that license.
        path: Which parts of the target are literal; see `encode_target`.
        target: Hash of the target channel.
        expiry: Seconds since `EPOCH`, 0 for never.
    """

    salt: int
    master: int
    contract: int
    signature: int
    path: int
    permissions: Permission
    target: int
    expiry: int = 0

    @property
    def expires(self) -> int:
        """Unix seconds, or 0 for never."""
        return self.expiry + EPOCH if self.expiry else 0

    @property
    def is_master(self) -> bool:
        """Whether it may create and ban keys, and nothing else."""
        return self.permissions == Permission.MASTER

    def is_expired(self, now: float) -> bool:
        """Whether it has expired at *now*, in unix seconds."""
        return self.expiry != 0 and self.expiry + EPOCH < now

    def allows(self, channel: str) -> bool:
        """Whether *channel*, which ends with a slash and may have wildcards, is covered."""
        return target_allows(self.path, self.target, channel)

    def to_bytes(self) -> bytes:
        """Return the 24 bytes."""
        tail = (self.path << 8 | int(self.permissions)).to_bytes(4, "big")
        return _FIELDS.pack(
            self.salt, self.master, self.contract, self.signature, tail, self.target, self.expiry
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Key:
        """Read 24 bytes."""
        salt, master, contract, signature, tail, target, expiry = _FIELDS.unpack(data)
        bits = Permission(tail[3])
        path = int.from_bytes(tail[:3], "big")
        return cls(salt, master, contract, signature, path, bits, target, expiry)

    def extended(self, channel: str, letters: str, ttl: int, now: float) -> Key:
        """Return this key for a private channel: no more than it had, and no ``e``.

        With *ttl* 0 it never expires, even where this one does; so do brokers.

        Raises:
            InvalidTarget: As `encode_target`.
        """
        path, target = encode_target(channel)
        bits = self.permissions & ~Permission.EXTEND & Permission.parse(letters)
        return replace(self, permissions=bits, path=path, target=target, expiry=_expiry(ttl, now))


def _expiry(ttl: int, now: float) -> int:
    return (int(now) + ttl - EPOCH) & _MASK if ttl else 0


# --- licenses --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class License:
    """The secret with which a broker encrypts and checks keys; its text is `text`.

    Attributes:
        version: Which cipher: 1 is XTEA, 2 XSalsa20, 3 Emitter's own "shuffle" of it.
        contract: The only contract whose keys the broker accepts.
        signature: A number that those keys must hold.
        master: How many master keys the license counts; brokers accept the first only.
        expires: Unix seconds, or 0 (version 1 only; brokers do not enforce it).
        kind: 2 is on-premise (version 1 only).
    """

    version: Version
    contract: int
    signature: int
    cipher_key: bytes = field(repr=False)
    nonce: bytes = field(default=b"", repr=False)
    master: int = 1
    expires: int = 0
    kind: int = 2

    @classmethod
    def generate(cls) -> License:
        """Return a new random license of version 3, as ``emitter license new`` does."""
        return cls(
            3,
            secrets.randbits(32),
            secrets.randbits(32),
            secrets.token_bytes(32),
            secrets.token_bytes(16),
        )

    @classmethod
    def parse(cls, text: str) -> License:
        """Read the text of a license, of any version.

        Raises:
            InvalidLicense: It is none; the message does not repeat it.
        """
        text = text.strip()
        if len(text) < 5:
            raise InvalidLicense("a license of fewer than 5 characters; copy all of it")
        body, colon, suffix = text.rpartition(":")
        if not colon:
            body, suffix = text, "1"
        data = _decode_base64(body)
        match suffix:
            case "1":
                return _license_v1(data)
            case "2":
                return _license(2, data, nonce_size=24)
            case "3":
                return _license(3, data, nonce_size=16)
            case _:
                raise InvalidLicense("a license of an unknown version; it ends in :1, :2 or :3")

    @property
    def text(self) -> str:
        """The license as brokers and tools take it. Secret."""
        if self.version == 1:
            expiry = self.expires - EPOCH if self.expires else 0
            data = self.cipher_key + struct.pack(
                ">4I", self.contract, self.signature, expiry, self.kind
            )
        else:
            plain = b"".join(
                (
                    encode_length(len(self.cipher_key)),
                    self.cipher_key,
                    encode_length(len(self.nonce)),
                    self.nonce,
                    encode_length(self.contract),
                    encode_length(self.signature),
                    encode_length(self.master),
                )
            )
            data = _snappy_literal(plain)
        return f"{base64.urlsafe_b64encode(data).rstrip(b'=').decode()}:{self.version}"

    # --- encrypting -------------------------------------------------------------------

    def encrypt(self, key: Key) -> str:
        """Return the 32 characters of *key*."""
        return base64.urlsafe_b64encode(self._crypt(key.to_bytes(), encrypt=True)).decode()

    def decrypt(self, text: str) -> Key:
        """Read a key. There is no checksum: the key of another license gives nonsense.

        Whether it belongs to this license tells `owns`.

        Raises:
            InvalidKey: It is not 32 characters of the URL-safe base64 alphabet.
        """
        if _ALPHABET.fullmatch(text) is None:
            raise InvalidKey(f"a key has {KEY_LENGTH} letters, digits, '-' or '_'")
        return Key.from_bytes(self._crypt(base64.urlsafe_b64decode(text), encrypt=False))

    def _crypt(self, data: bytes, *, encrypt: bool) -> bytes:
        match self.version:
            case 1 if encrypt:
                return _xtea(_whiten(data), self.cipher_key, encrypt=True)
            case 1:
                return _whiten(_xtea(data, self.cipher_key, encrypt=False))
            case 2:
                return _xor(data, _stream_v2(self.cipher_key, self.nonce))
            case 3:
                salt = data[:2]
                mixed = _xor(self.nonce, salt * 8)
                stream = _salsa20(_hsalsa20(self.cipher_key, mixed), mixed)
                return salt + _xor(data[2:], stream)

    def owns(self, key: Key) -> bool:
        """Whether *key* was made with this license: contract, signature and master agree."""
        return (
            key.contract == self.contract
            and key.signature == self.signature
            and key.master == _MASTER
        )

    # --- making keys ------------------------------------------------------------------

    def make_master_key(self) -> str:
        """Return a new master key."""
        return self.encrypt(
            Key(_salt(), _MASTER, self.contract, self.signature, 0, Permission.MASTER, 0)
        )

    def make_key(
        self, channel: str, permissions: str, *, ttl: int = 0, now: float | None = None
    ) -> str:
        """Return a new key for *channel*, without asking a broker.

        Args:
            channel: Ends with ``/``: ``a/b/`` for that channel, ``a/b/#/`` for those below,
                too. Reading reaches below in any case; the README says how far.
            permissions: Letters: ``r`` subscribe, ``w`` publish, ``s`` store, ``l`` load,
                ``p`` presence, ``e`` extend.
            ttl: Seconds until it expires; 0 for never.
            now: Unix seconds that *ttl* counts from.

        Raises:
            InvalidTarget: *channel* cannot be the target of a key.
        """
        path, target = encode_target(channel)
        return self.encrypt(
            Key(
                _salt(),
                _MASTER,
                self.contract,
                self.signature,
                path,
                Permission.parse(permissions),
                target,
                _expiry(ttl, time.time() if now is None else now),
            )
        )


def _salt() -> int:
    return secrets.randbelow(_MAX_SALT + 1)


@lru_cache(maxsize=64)
def _stream_v2(cipher_key: bytes, nonce: bytes) -> bytes:
    # All keys of a license of version 2 are encrypted with the same stream.
    return _salsa20(_hsalsa20(cipher_key, nonce[:16]), nonce[16:] + bytes(8))


def _license_v1(data: bytes) -> License:
    if len(data) < 32:
        raise InvalidLicense(f"a license of {len(data)} bytes; version 1 has 32")
    contract, signature, expiry, kind = struct.unpack(">4I", data[16:32])
    expires = expiry + EPOCH if expiry else 0
    return License(1, contract, signature, data[:16], expires=expires, kind=kind)


def _license(version: Version, data: bytes, *, nonce_size: int) -> License:
    plain = _unsnappy(data)
    cipher_key, at = _read_bytes(plain, 0)
    nonce, at = _read_bytes(plain, at)
    contract, at = _read_uvarint(plain, at)
    signature, at = _read_uvarint(plain, at)
    master, _ = _read_uvarint(plain, at)
    if len(cipher_key) != 32 or len(nonce) != nonce_size:
        raise InvalidLicense("a license whose cipher key or nonce has another size")
    if max(contract, signature) > _MASK or master > 0xFFFF:
        raise InvalidLicense("a license with a number that is too large")
    return License(version, contract, signature, cipher_key, nonce, master)


def _decode_base64(text: str) -> bytes:
    if len(text) > _MAX_LICENSE_BYTES:
        raise InvalidLicense(f"a license of {len(text)} characters")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        pass
    raise InvalidLicense("a license with characters that are not base64url; copy all of it")


# --- bytes -----------------------------------------------------------------------------


def _read_uvarint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise InvalidLicense("a license that ends within a number; copy all of it")


def _read_bytes(data: bytes, at: int) -> tuple[bytes, int]:
    size, at = _read_uvarint(data, at)
    if at + size > len(data):
        raise InvalidLicense("a license that ends too early; copy all of it")
    return data[at : at + size], at + size


def _snappy_literal(data: bytes) -> bytes:
    """Return *data* as a Snappy block of one literal: random bytes cannot be compressed."""
    size = len(data)
    tag = bytes(((size - 1) << 2,)) if size <= 60 else bytes((0xF0, size - 1))
    return encode_length(size) + tag + data


def _unsnappy(data: bytes) -> bytes:
    """Decompress a Snappy block."""
    size, at = _read_uvarint(data, 0)
    if size > _MAX_LICENSE_BYTES:
        raise InvalidLicense(f"a license of {size} bytes")
    out = bytearray()
    while at < len(data) and len(out) <= size:
        tag = data[at]
        at += 1
        kind, value = tag & 3, tag >> 2
        if kind == 0:
            if value >= 60:
                extra = value - 59
                value = int.from_bytes(data[at : at + extra], "little")
                at += extra
            if at + value + 1 > len(data):
                raise InvalidLicense("a license that ends too early; copy all of it")
            out += data[at : at + value + 1]
            at += value + 1
            continue
        if kind == 1:
            length, width, high = (value & 7) + 4, 1, tag >> 5 << 8
        else:
            length, width, high = value + 1, (0, 0, 2, 4)[kind], 0
        offset = high | int.from_bytes(data[at : at + width], "little")
        at += width
        if not 0 < offset <= len(out) or len(out) + length > size:
            raise InvalidLicense("a license whose compression is damaged; copy all of it")
        for _ in range(length):
            out.append(out[-offset])
    if len(out) != size:
        raise InvalidLicense("a license whose compression is damaged; copy all of it")
    return bytes(out)
