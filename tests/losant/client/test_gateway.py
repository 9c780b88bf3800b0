"""A gateway and its peripherals share one connection."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pubsub_losant import Gateway
from tests.losant.support import (
    PUBLISH,
    SUBSCRIBE,
    UNSUBSCRIBE,
    Events,
    command,
    connected,
    make,
    scripted,
    turn_until,
    wait_until,
)
from tests.losant.vectors import DEVICE

pytestmark = pytest.mark.usefixtures("no_leaks")

ONE, TWO = "c1c1c1c1c1c1c1c1c1c1c1c1", "f1f1f1f1f1f1f1f1f1f1f1f1"


@pytest.mark.parametrize("early", [True, False], ids=["before connecting", "after connecting"])
def test_a_peripheral_receives_its_commands(early: bool) -> None:
    with scripted() as broker:
        gateway = make(broker, Gateway)
        events = Events().watch(gateway)
        peripheral = gateway.add_peripheral(ONE) if early else None
        gateway.connect(blocking=False)
        turn_until(gateway, lambda: "connect" in events.names)
        if peripheral is None:
            peripheral = gateway.add_peripheral(ONE)
        told = Events().watch(peripheral)
        wait_until(lambda: len(broker.of(SUBSCRIBE)) == 2)
        assert [packet.filters for packet in broker.of(SUBSCRIBE)] == [
            [(f"losant/{DEVICE}/command", 0)],
            [(f"losant/{ONE}/command", 0)],
        ]
        broker.send(command('{"name":"own"}') + command('{"name":"hers"}', ONE))
        turn_until(gateway, lambda: told.seen)
        assert events.of("command") == [({"name": "own"},)]
        assert told.of("command") == [({"name": "hers"},)]
        gateway.close()


def test_a_peripherals_state_goes_to_its_own_topic() -> None:
    with scripted() as broker, connected(broker, Gateway) as (gateway, _):
        peripheral = gateway.add_peripheral(ONE)
        assert peripheral.send_state({"a": 1}, 5) is True
        assert peripheral.send_states([({"a": 1}, 5), ({"a": 2}, 6)]) is True
        assert gateway.send_state({"b": 1}, 6) is True
        wait_until(lambda: len(broker.of(PUBLISH)) == 3)
        assert [(packet.topic, packet.payload) for packet in broker.of(PUBLISH)] == [
            (f"losant/{ONE}/state", b'{"data": {"a": 1}, "time": 5}'),
            (
                f"losant/{ONE}/state",
                b'[{"data": {"a": 1}, "time": 5}, {"data": {"a": 2}, "time": 6}]',
            ),
            (f"losant/{DEVICE}/state", b'{"data": {"b": 1}, "time": 6}'),
        ]


def test_the_same_id_is_the_same_peripheral() -> None:
    with scripted() as broker, connected(broker, Gateway) as (gateway, _):
        peripheral = gateway.add_peripheral(ONE)
        assert gateway.add_peripheral(ONE) is peripheral
        assert gateway.peripherals == (peripheral,)
        assert (peripheral.id, peripheral.device_id) == (ONE, ONE)
        for bad in ("a/b", DEVICE):
            with pytest.raises(ValueError, match=r"."):
                gateway.add_peripheral(bad)


def test_peripherals_hear_of_their_gateways_connection_and_come_back_with_it() -> None:
    with scripted() as broker:
        gateway = make(broker, Gateway)
        told = [Events().watch(gateway.add_peripheral(each)) for each in (ONE, TWO)]
        gateway.connect(blocking=False)
        turn_until(gateway, lambda: told[1].seen)
        broker.cut()
        turn_until(gateway, lambda: len(told[1].seen) == 2)
        second = [packet.filters for packet in broker.of(SUBSCRIBE) if packet.connection == 2]
        assert second == [
            [(f"losant/{DEVICE}/command", 0)],
            [(f"losant/{ONE}/command", 0), (f"losant/{TWO}/command", 0)],
        ]
        gateway.close()
        for each in told:
            assert each.names == ["connect", "reconnect", "close"]


def test_a_removed_peripheral_is_unsubscribed_and_can_send_no_more() -> None:
    with scripted() as broker, connected(broker, Gateway) as (gateway, events):
        peripheral = gateway.add_peripheral(ONE)
        told = Events().watch(peripheral)
        gateway.remove_peripheral(ONE)
        gateway.remove_peripheral(ONE)
        wait_until(lambda: broker.of(UNSUBSCRIBE))
        broker.send(command('{"name":"late"}', ONE) + command('{"name":"own"}'))
        turn_until(gateway, lambda: events.of("command"))
        assert told.seen == []
        assert peripheral.send_state({"a": 1}) is False


def test_an_observer_of_a_peripheral_can_be_removed() -> None:
    peripheral = Gateway(DEVICE, "k", "s").add_peripheral(ONE)

    def observer(*_: Any) -> None:
        raise AssertionError

    peripheral.add_event_observer("command", observer)
    peripheral.remove_event_observer("command", observer)
    with pytest.raises(ValueError, match=r"not in list"):
        peripheral.remove_event_observer("command", observer)


def test_states_of_all_are_kept_while_offline_each_on_its_topic() -> None:
    with scripted() as broker, connected(broker, Gateway, buffer_offline=10) as (gateway, events):
        peripheral = gateway.add_peripheral(ONE)
        broker.connack = b"\x20\x02\x00\x03"
        broker.cut()
        turn_until(gateway, lambda: "disconnect" in events.names)
        for n in range(3):
            assert gateway.send_state({"n": n})
            assert peripheral.send_state({"n": 10 + n})
        broker.connack = b"\x20\x02\x00\x00"
        turn_until(gateway, lambda: len(broker.of(PUBLISH)) == 2)
        found = {
            packet.topic: [each["data"]["n"] for each in json.loads(packet.payload)]
            for packet in broker.of(PUBLISH)
        }
        assert found == {
            f"losant/{DEVICE}/state": [0, 1, 2],
            f"losant/{ONE}/state": [10, 11, 12],
        }
