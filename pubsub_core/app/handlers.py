"""Declared handlers and authorizers, and how they are put on a bus."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pubsub_core.authorization import Authorizer
from pubsub_core.errors import ConfigError
from pubsub_core.interfaces import AuthorizationRequest
from pubsub_core.subscription import HandlerOptions, Subscription
from pubsub_core.sync import marked
from pubsub_core.threads import is_async
from pubsub_core.topics import TopicFilter

from .parameters import Arguments, Filler, OpenBuses, fillers_of, name_of

__all__ = ["DeclaredAuthorizer", "DeclaredHandler", "Planned"]


class Planned(abc.ABC):
    """A declared function, and the sources of its parameters."""

    role: ClassVar[str]

    def __init__(self, function: Callable[..., Any], filter: TopicFilter, bus: str) -> None:
        self.function = function
        self.filter = filter
        self.bus = bus
        self.fillers: tuple[Filler, ...] | None = None

    @abc.abstractmethod
    def _plan(self, namespace: Mapping[str, Any] | None) -> tuple[Filler, ...]: ...

    def plan(self, namespace: Mapping[str, Any] | None) -> None:
        """Match the parameters, once; an unknown name may wait for the start.

        Args:
            namespace: Names beside the module's; None for the last attempt.
        """
        if self.fillers is not None:
            return
        if inspect.isgeneratorfunction(self.function) or inspect.isasyncgenfunction(self.function):
            raise ConfigError(
                f"{self.role} {name_of(self.function)} yields",
                hint="publish or return instead of yielding",
            )
        try:
            self.fillers = self._plan(namespace)
        except NameError as exc:
            if namespace is None:
                raise ConfigError(
                    f"an annotation of {self.role} {name_of(self.function)} cannot be resolved: "
                    f"{exc}",
                    hint=f"define the name in the {self.role}'s module, or leave it out",
                ) from exc

    def other_buses(self) -> list[str]:
        """Return names of buses that its parameters ask for."""
        self.plan(None)
        return [each.source for each in self.fillers or () if each.kind == "bus" and each.source]


class DeclaredHandler(Planned):
    """One declaration of a handler."""

    role = "handler"

    def __init__(
        self,
        function: Callable[..., Any],
        filter: TopicFilter,
        bus: str,
        type: Any,
        options: HandlerOptions,
    ) -> None:
        super().__init__(function, filter, bus)
        self.type = type
        self.options = options
        self.found_type: Any = bytes

    def _plan(self, namespace: Mapping[str, Any] | None) -> tuple[Filler, ...]:
        fillers, self.found_type = fillers_of(
            self.function,
            self.filter,
            plain=not is_async(self.function),
            namespace=namespace,
            gaps=self.options.get("gaps", False),
            given_type=self.type,
        )
        return fillers

    def subscribe(self, buses: OpenBuses) -> Subscription[Any]:
        """Return the subscription, not yet entered."""
        self.plan(None)
        return buses.named(self.bus).subscribe(
            self.filter.text,
            self.type if self.type is not None else self.found_type,
            handler=self._bound(self.fillers or (), buses),
            **self.options,
        )

    def _bound(self, fillers: tuple[Filler, ...], buses: OpenBuses) -> Callable[[Any], Any]:
        function = self.function
        if [each.kind for each in fillers] == ["message"] and not fillers[0].keyword:
            return marked(function, buses.named(self.bus))
        arguments = Arguments(fillers, buses, self.bus)

        # The bus tells the two kinds apart, and runs the plain one in a thread.
        async def handle(message: Any) -> None:
            await arguments.call(function, message)

        def handle_plainly(message: Any) -> Any:
            return arguments.call(function, message)

        return handle if is_async(function) else marked(handle_plainly, buses.named(self.bus))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question as parameters see it: in the place of a message."""

    request: AuthorizationRequest
    params: Mapping[str, str]

    @property
    def topic(self) -> str:
        return self.request.topic


class DeclaredAuthorizer(Planned):
    """One declaration of an authorizer."""

    role = "authorizer"

    def __init__(
        self,
        function: Callable[..., Any],
        filter: TopicFilter,
        bus: str,
        timeout: float | None,
    ) -> None:
        super().__init__(function, filter, bus)
        self.timeout = timeout

    def _plan(self, namespace: Mapping[str, Any] | None) -> tuple[Filler, ...]:
        plain = not is_async(self.function)
        return fillers_of(
            self.function, self.filter, plain=plain, namespace=namespace, role=self.role
        )[0]

    async def authorize(self, buses: OpenBuses) -> Authorizer:
        """Put it in place."""
        self.plan(None)
        bus = buses.named(self.bus)
        arguments = Arguments(self.fillers or (), buses, self.bus)
        function, params = self.function, self.filter.params

        async def answer(request: AuthorizationRequest) -> Any:
            return await arguments.call(function, _Asked(request, params(request.topic)))

        def answer_plainly(request: AuthorizationRequest) -> Any:
            return arguments.call(function, _Asked(request, params(request.topic)))

        handler = answer if is_async(function) else marked(answer_plainly, bus)
        return await bus.authorize(self.filter.text, handler, timeout=self.timeout)
