"""The inverse of a case: an operation must be refused where its capability is missing.

No case of the suite is skipped because a backend cannot do something: it is turned round. The
operation of the capability must raise `NotSupported` with the capability, the reason and a
remedy; and so must asking for the capability with ``require=``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pubsub_core.bus import Bus
from pubsub_core.capabilities import Cap, Level
from pubsub_core.errors import NotSupported
from pubsub_core.interfaces import AuthorizationRequest
from pubsub_core.message import Member, Part

from .trial import Trial

__all__ = ["refused"]


async def _wildcards(t: Trial, bus: Bus) -> None:
    await t.subscribed(bus, t.topic("+"))


async def _groups(t: Trial, bus: Bus) -> None:
    await t.subscribed(bus, t.topic(), group="workers")


async def _retained(t: Trial, bus: Bus) -> None:
    with t.raises(NotSupported) as caught:
        await t.within(bus.last(t.topic()))
    t.check_refusal(caught[0], [Cap.RETAINED])
    await t.within(bus.publish(t.topic(), b"x", retain=True))


async def _history(t: Trial, bus: Bus) -> None:
    async for _ in bus.history(t.topic(), last=1):
        raise AssertionError("history gave a message although it is not supported")


async def _replay(t: Trial, bus: Bus) -> None:
    await t.subscribed(bus, t.topic(), replay=1)


async def _ttl(t: Trial, bus: Bus) -> None:
    await t.within(bus.publish(t.topic(), b"x", ttl=60))


async def _headers(t: Trial, bus: Bus) -> None:
    await t.within(bus.publish(t.topic(), b"x", headers={"name": "value"}))


async def _content_type(t: Trial, bus: Bus) -> None:
    await t.within(bus.publish(t.topic(), b"x", content_type="text/plain"))


async def _presence(t: Trial, bus: Bus) -> None:
    with t.raises(NotSupported) as caught:
        await t.within(bus.members(t.topic()))
    t.check_refusal(caught[0], [Cap.PRESENCE])
    async with bus.presence(t.topic()):
        pass


async def _notifications(t: Trial, bus: Bus) -> None:
    async with bus.notifications(t.topic()):
        pass


async def _unicast(t: Trial, bus: Bus) -> None:
    await t.within(bus.send_to("somebody", t.topic(), b"x"))


async def _ack(t: Trial, bus: Bus) -> None:
    await t.subscribed(bus, t.topic(), ack="manual")


async def _nack(t: Trial, bus: Bus) -> None:
    subscription = await t.subscribed(bus, t.topic())
    await t.within(bus.publish(t.topic(), b"x"))
    message = await t.get(subscription)
    await t.within(message.nack())


async def _flow_control(t: Trial, bus: Bus) -> None:
    await t.subscribed(bus, t.topic(), overflow="block")


async def _echo_control(t: Trial, bus: Bus) -> None:
    await t.connect(echo=False)


async def _entitlements(t: Trial, bus: Bus) -> None:
    parts = [Part(b"open"), Part(b"secret", entitlements=frozenset({1}))]
    await t.within(bus.publish(t.topic(), parts=parts))


async def _authorization(t: Trial, bus: Bus) -> None:
    async def nobody(request: AuthorizationRequest) -> None:
        raise AssertionError(f"asked about {request.topic!r} although it is not supported")

    request = AuthorizationRequest(Member("somebody"), t.topic())
    with t.raises(NotSupported) as caught:
        await t.within(bus.entitle(request, {1}))
    t.check_refusal(caught[0], [Cap.AUTHORIZATION])
    async with bus.authorize(t.topic(), nobody):
        pass


async def _ping(t: Trial, bus: Bus) -> None:
    await t.within(bus.ping())


_OPERATIONS: dict[Cap, Callable[[Trial, Bus], Awaitable[None]]] = {
    Cap.WILDCARDS: _wildcards,
    Cap.GROUPS: _groups,
    Cap.RETAINED: _retained,
    Cap.HISTORY: _history,
    Cap.REPLAY: _replay,
    Cap.TTL: _ttl,
    Cap.HEADERS: _headers,
    Cap.CONTENT_TYPE: _content_type,
    Cap.PRESENCE: _presence,
    Cap.NOTIFICATIONS: _notifications,
    Cap.UNICAST: _unicast,
    Cap.ACK: _ack,
    Cap.NACK: _nack,
    Cap.FLOW_CONTROL: _flow_control,
    Cap.ECHO_CONTROL: _echo_control,
    Cap.ENTITLEMENTS: _entitlements,
    Cap.AUTHORIZATION: _authorization,
    Cap.PING: _ping,
}


async def refused(t: Trial, cap: Cap) -> None:
    """Check that everything that needs *cap* is refused as it must be."""
    with t.raises(NotSupported) as caught:
        await t.connect(require=[cap])
    t.check_refusal(caught[0], [cap])
    bus = await t.connect()
    found = bus.supports(cap)
    assert found.level is Level.NONE
    assert not found
    assert found.why, f"{cap} is missing without a reason"
    operation = _OPERATIONS.get(cap)
    if operation is None:
        return  # nothing to call: the capability says how the broker behaves
    with t.raises(NotSupported) as refusal:
        await operation(t, bus)
    # Replaying needs a history; the refusal may name either.
    t.check_refusal(refusal[0], [cap, Cap.HISTORY] if cap is Cap.REPLAY else [cap])
