"""The certificate of a server, as files that Mosquitto and an endpoint read alike."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pubsub_core.errors import BadOption, TLSProblem

__all__ = ["ServerTLS"]


@dataclass(frozen=True, slots=True)
class ServerTLS:
    """Certificate and key of a server; paths of PEM files.

    Attributes:
        cafile: Authority of client certificates.
        require_certificate: Refuse clients without a certificate of that authority.
    """

    certfile: str | Path
    keyfile: str | Path
    cafile: str | Path | None = None
    require_certificate: bool = False

    @classmethod
    def pair(
        cls, certfile: str | None, keyfile: str | None, *, backend: str, needed: bool = False
    ) -> Self | None:
        """Return the two as one, or None where neither is given.

        Args:
            certfile: Option ``certfile`` of a server.
            keyfile: Option ``keyfile`` of a server.
            backend: Name for the error.
            needed: Refuse that neither is given.

        Raises:
            BadOption: One is missing.
        """
        if certfile is not None and keyfile is not None:
            return cls(certfile, keyfile)
        if certfile is not None or keyfile is not None or needed:
            raise BadOption(
                "a server with TLS needs both certfile and keyfile",
                option="certfile" if certfile is None else "keyfile",
                backend=backend,
            )
        return None

    def context(self, *, backend: str) -> ssl.SSLContext:
        """Return a context for the server's side. Reads files, so call it off the event loop.

        Raises:
            TLSProblem: The files cannot be used; it names *backend*.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certfile, self.keyfile)
            if self.cafile is not None:
                context.load_verify_locations(self.cafile)
        except (OSError, ssl.SSLError) as exc:
            raise TLSProblem(
                f"certificate {self.certfile} or its key cannot be used: {exc}",
                hint="give PEM files that belong together",
                backend=backend,
            ) from exc
        if self.require_certificate:
            context.verify_mode = ssl.CERT_REQUIRED
        return context
