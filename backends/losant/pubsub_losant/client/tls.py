"""Which certificates are trusted: the system's, or exactly those that were named.

``losant-mqtt`` trusts two roots it carries with it, so that a new chain of the platform, or
an installation with its own authority, needs another release. Nothing is carried here.
"""

from __future__ import annotations

import importlib
import ssl
from dataclasses import dataclass, field

__all__ = ["TLSOptions"]


@dataclass(frozen=True, slots=True)
class TLSOptions:
    """The arguments of a device about certificates.

    Attributes:
        context: Used as it is.
    """

    cafile: str | None = None
    capath: str | None = None
    cadata: str | bytes | None = field(default=None, repr=False)
    certfile: str | None = None
    keyfile: str | None = None
    context: ssl.SSLContext | None = None

    @property
    def given(self) -> bool:
        """Whether anything was set."""
        return self.context is not None or self.details

    @property
    def details(self) -> bool:
        """Whether anything but the context was set."""
        named = (self.cafile, self.capath, self.cadata, self.certfile, self.keyfile)
        return any(value is not None for value in named)

    @property
    def certificate(self) -> bool:
        """Whether the device may prove who it is by a certificate."""
        return self.certfile is not None or self.context is not None

    def build(self) -> ssl.SSLContext:
        """Return a context that checks chain and host name. Reads files.

        Raises:
            OSError: A file is missing, or holds no certificate (`ssl.SSLError`).
        """
        if self.context is not None:
            return self.context
        context = ssl.create_default_context(
            ssl.Purpose.SERVER_AUTH, cafile=self.cafile, capath=self.capath, cadata=self.cadata
        )
        context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
        named = self.cafile or self.capath or self.cadata
        if not named and not context.cert_store_stats()["x509_ca"]:
            # A slim image without a system store; certifi is a convenience, no dependency.
            try:
                certifi = importlib.import_module("certifi")
            except ModuleNotFoundError:
                pass
            else:
                context.load_verify_locations(certifi.where())
        if self.certfile is not None:
            # Without a password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(self.certfile, self.keyfile, password="")
        return context
