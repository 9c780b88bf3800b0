"""The logins of a client, as ``jetblack_messagebus.authentication``.

Servers up to 3.0 read the handshake ``strings``, those from 4.0 to 5.1.1, which are current,
``connection-string``. Nothing tells a client which it is: the wrong one ends in silence.
"""

from __future__ import annotations

import abc

from pubsub_core.secrets import Secret

from .io import DataReader, DataWriter
from .protocol import HandshakeForm, basic_handshake, token_handshake

__all__ = ["Authenticator", "BasicAuthenticator", "NullAuthenticator", "TokenAuthenticator"]


class Authenticator(abc.ABC):
    """Logs a client in. Write your own with these two streams."""

    @abc.abstractmethod
    async def authenticate(self, reader: DataReader, writer: DataWriter) -> None:
        """Send the handshake; the server answers nothing."""


class NullAuthenticator(Authenticator):
    """Sends nothing."""

    async def authenticate(self, reader: DataReader, writer: DataWriter) -> None:
        """Send nothing."""


class _Claims(Authenticator):
    """The common part of user and token: on whose behalf, and which handshake carries it."""

    def __init__(
        self,
        impersonating: str | None,
        forwarded_for: str | None,
        application: str | None,
        handshake: HandshakeForm | None,
    ) -> None:
        self.impersonating = impersonating
        self.forwarded_for = forwarded_for
        self.application = application
        self.handshake: HandshakeForm | None = handshake
        self._handshake()  # refuses now a value that cannot be sent

    @abc.abstractmethod
    def _handshake(self) -> bytes:
        """Return the handshake."""

    async def authenticate(self, reader: DataReader, writer: DataWriter) -> None:
        """Send the handshake."""
        writer.writer.write(self._handshake())
        await writer.drain()


class BasicAuthenticator(_Claims):
    """A user name and a password.

    Args:
        application: Needs servers from 4.0, and chooses their handshake.
        handshake: ``strings`` for servers up to 3.0 (the default, as in the package 3.0.1),
            ``connection-string`` for all later ones.

    Raises:
        ValueError: A value cannot be carried, e.g. a ``;`` in a connection string.
    """

    def __init__(
        self,
        username: str,
        password: str,
        impersonating: str | None = None,
        forwarded_for: str | None = None,
        application: str | None = None,
        *,
        handshake: HandshakeForm | None = None,
    ) -> None:
        self.username = username
        self.password = password
        del password  # an error that passes here must not show it among the variables
        super().__init__(impersonating, forwarded_for, application, handshake)

    def _handshake(self) -> bytes:
        return basic_handshake(
            self.username,
            Secret(self.password),
            self.impersonating,
            self.forwarded_for,
            self.application,
            form=self.handshake,
        )

    def __repr__(self) -> str:
        return f"BasicAuthenticator({self.username!r}, {Secret(self.password)!r})"


class TokenAuthenticator(_Claims):
    """A token, as a rule a JWT; arguments as those of `BasicAuthenticator`."""

    def __init__(
        self,
        token: str,
        impersonating: str | None = None,
        forwarded_for: str | None = None,
        application: str | None = None,
        *,
        handshake: HandshakeForm | None = None,
    ) -> None:
        self.token = token
        del token  # as above
        super().__init__(impersonating, forwarded_for, application, handshake)

    def _handshake(self) -> bytes:
        return token_handshake(
            Secret(self.token),
            self.impersonating,
            self.forwarded_for,
            self.application,
            form=self.handshake,
        )

    def __repr__(self) -> str:
        return f"TokenAuthenticator({Secret(self.token)!r})"
