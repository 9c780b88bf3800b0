"""Servers, certificates and leak checks that many tests need.

The fixtures over them are in ``conftest.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gc
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

T = TypeVar("T")

SLOW_STEPS_UNTOLD = (
    "import logging\n"
    "logging.getLogger('asyncio').addFilter(lambda record: ' took ' not in record.msg)\n"
)
"""First lines of a program for ``python -X dev`` whose standard error has to stay empty.

Debug mode tells there of every step of the event loop that took 0.1 s; on a busy machine many do.
"""


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run *coroutine* in a loop of its own, for fixtures that outlive the loop of a test."""
    # In a thread of its own, since pytest may ask for a fixture while a loop runs.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


async def eventually(
    condition: Callable[[], object], *, within: float = 20.0, what: str = ""
) -> None:
    """Return once *condition* is true; fail when it is not within so many seconds."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what or condition}")
        await asyncio.sleep(0.005)


# --- certificates ----------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """Paths of a certificate and its key."""

    certfile: str
    keyfile: str


@dataclass
class Authority:
    """A certificate authority that lives in *directory*."""

    directory: Path
    name: str = "test authority"
    cafile: str = field(init=False)

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=3))
            .not_valid_after(now + dt.timedelta(days=3))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False
            )
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True,
                    key_cert_sign=True,
                    crl_sign=True,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .sign(self._key, hashes.SHA256())
        )
        path = self.directory / f"{self.name.replace(' ', '-')}.pem"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.cafile = str(path)

    def issue(
        self,
        name: str,
        *,
        hosts: tuple[str, ...] = ("localhost", "127.0.0.1"),
        expired: bool = False,
        client: bool = False,
    ) -> Certificate:
        """Make a certificate of this authority and return where it is."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=2))
            .not_valid_after(now + dt.timedelta(days=-1 if expired else 2))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        if not client:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general_name(host) for host in hosts]),
                critical=False,
            )
        certificate = builder.sign(self._key, hashes.SHA256())
        path = self.directory / f"{name}.crt"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        keyfile = self.directory / f"{name}.key"
        keyfile.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return Certificate(str(path), str(keyfile))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


# --- leaks -----------------------------------------------------------------------------

_UVLOOP = os.environ.get("PUBSUB_TEST_LOOP") == "uvloop"


def _threads() -> set[threading.Thread]:
    # The loop's default executor keeps its threads until the loop is closed.
    own = ("asyncio_", "uvloop_")
    return {thread for thread in threading.enumerate() if not thread.name.startswith(own)}


def _descriptors() -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except OSError:  # the descriptor that lists the folder
            continue
    return {name: target for name, target in found.items() if f"/proc/{os.getpid()}/" not in target}


def _pairs(descriptors: Mapping[str, str]) -> set[str]:
    """Return those of *descriptors* that are sockets of a pair, which have no address."""
    found: set[str] = set()
    for name, target in descriptors.items():
        if target.startswith("socket:"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as same:
                if same.family is socket.AF_UNIX and not same.getsockname():
                    found.add(name)
    return found


def _tasks() -> set[asyncio.Task[Any]]:
    try:
        return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
    except RuntimeError:
        return set()


class LeakCheck:
    """What was there at the start: tasks, threads and descriptors."""

    def __init__(self) -> None:
        # Nothing is collected first: garbage of earlier tests that goes during this one is no
        # leak, and collecting cost a sixth of the time of all tests.
        self._tasks = _tasks()
        self._threads = _threads()
        self._descriptors = _descriptors()
        self._pairs = len(_pairs(self._descriptors)) if _UVLOOP else 0

    def leaks(self) -> list[str]:
        """Return what is there now and was not at the start."""
        return [
            *(f"task {task!r}" for task in _tasks() - self._tasks if not task.done()),
            *(f"thread {thread!r}" for thread in _threads() - self._threads),
            *(f"descriptor {name} -> {target}" for name, target in self._opened().items()),
        ]

    def _opened(self) -> dict[str, str]:
        now = _descriptors()
        opened = {
            name: target for name, target in now.items() if self._descriptors.get(name) != target
        }
        if opened and _UVLOOP:
            # It has a new pair of sockets for signals each time that it runs, and opens a spare
            # descriptor with its first listener; both stay until the loop is closed.
            pairs = _pairs(now)
            if len(pairs) <= self._pairs:
                opened = {name: target for name, target in opened.items() if name not in pairs}
            spare = next((name for name, target in opened.items() if target == os.devnull), "")
            opened.pop(spare, None)
        return opened

    async def check(self, *, within: float = 20.0) -> None:
        """Fail unless everything that came has gone, within so many seconds."""
        deadline = time.monotonic() + within
        while (leaks := self.leaks()) and time.monotonic() < deadline:
            gc.collect()
            await asyncio.sleep(0.01)
        assert not leaks, "left behind: " + "; ".join(leaks)
