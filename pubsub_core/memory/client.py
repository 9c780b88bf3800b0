"""The interface between a space and its clients.

The space calls its clients and they call it. Both read this module, and neither the other's:
`Client` is the interface, and `MemoryBackend` the one class that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pubsub_core.clock import Clock
from pubsub_core.events import InterestEvent, Notice
from pubsub_core.interfaces import AuthorizationRequest, BackendContext, Sink, WireSub
from pubsub_core.message import InFrame, Member

from .options import MemoryOptions

__all__ = ["Client", "Group", "LocalSub"]


class Client(Protocol):
    """One client of a space.

    Attributes:
        time: `Clock.time` of its clock, since a publish asks for nothing else of it.
        member: Who it is to others.
        sink: None while there is no session.
        subscriptions: By the number of the `WireSub`.
        paused: Whether publishers wait for it.
    """

    context: BackendContext
    options: MemoryOptions
    clock: Clock
    time: Callable[[], float]
    member: Member
    sink: Sink | None
    subscriptions: dict[int, LocalSub]
    paused: bool

    def take(self, frame: InFrame, group: Group | None = None, *, manual: bool = False) -> None:
        """Receive the visible part of one message; a *manual* one waits for an ack."""
        ...

    def tell(self, event: InterestEvent) -> None:
        """Receive one change of interest."""
        ...

    def note(self, notice: Notice) -> None:
        """Receive a notice."""
        ...

    def ask(self, request: AuthorizationRequest) -> None:
        """Receive a question about another client."""
        ...

    def cut(self, error: BaseException) -> None:
        """Lose the session; callable from any thread."""
        ...

    async def unpaused(self) -> None:
        """Return when publishers need not wait for it any longer."""
        ...


class LocalSub:
    """One wire subscription of one client."""

    __slots__ = ("client", "filter", "want")

    def __init__(self, client: Client, want: WireSub) -> None:
        self.client = client
        self.want = want
        self.filter = want.filter


class Group:
    """The members of one share group; each message goes to the next one that can take it."""

    __slots__ = ("_turn", "members")

    def __init__(self) -> None:
        self.members: list[LocalSub] = []
        self._turn = 0

    def pick(self, members: Sequence[LocalSub]) -> LocalSub:
        """Return the next of these *members* that has a session; there is at least one."""
        present = [member for member in members if member.client.sink is not None]
        if not present:
            return members[0]
        self._turn = (self._turn + 1) % len(present)
        return present[self._turn]
