"""The codec: golden bytes of the standard, every fragmentation, and hostile bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_mqtt.server.endpoint.packets import (
    MAX_LENGTH,
    ConnAck,
    Connect,
    Decoder,
    Disconnect,
    Leniency,
    Packet,
    PacketError,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    UnsubAck,
    Unsubscribe,
    WillMessage,
    encode,
)

ids = st.integers(1, 65535)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
payloads = st.binary(max_size=300)
qualities = st.integers(0, 2)

packets: st.SearchStrategy[Packet] = st.one_of(
    st.builds(
        Connect,
        texts,
        st.none(),
        st.none(),
        st.integers(0, 65535),
        st.booleans(),
        st.none() | st.builds(WillMessage, texts, payloads, qualities, st.booleans()),
        st.sampled_from(["MQTT", "MQIsdp"]),
        st.sampled_from([3, 4]),
    ),
    st.builds(Connect, texts, texts, st.none() | payloads),
    st.builds(ConnAck, st.integers(0, 5), st.booleans()),
    st.builds(Publish, texts, payloads, st.just(0), st.booleans()),
    st.builds(Publish, texts, payloads, st.integers(1, 2), st.booleans(), st.booleans(), ids),
    st.builds(PubAck, ids),
    st.builds(PubRec, ids),
    st.builds(PubRel, ids),
    st.builds(PubComp, ids),
    st.builds(Subscribe, ids, st.lists(st.tuples(texts, qualities), min_size=1).map(tuple)),
    st.builds(SubAck, ids, st.lists(st.sampled_from([0, 1, 2, 128]), min_size=1).map(tuple)),
    st.builds(Unsubscribe, ids, st.lists(texts, min_size=1).map(tuple)),
    st.builds(UnsubAck, ids),
    st.just(PingReq()),
    st.just(PingResp()),
    st.just(Disconnect()),
)


def decode(data: bytes, *, cut: int = 0, limit: int = MAX_LENGTH) -> list[Packet]:
    decoder = Decoder(limit)
    found: list[Packet] = []
    for start in range(0, len(data), cut or len(data) or 1):
        decoder.receive(data[start : start + cut] if cut else data)
        while (packet := decoder.next_packet()) is not None:
            found.append(packet)
    return found


@given(st.lists(packets, max_size=6), st.integers(1, 9))
def test_packets_survive_any_fragmentation(sent: list[Packet], cut: int) -> None:
    data = b"".join(map(encode, sent))
    assert decode(data, cut=cut) == sent
    assert decode(data) == sent


@given(st.binary(max_size=200), st.integers(1, 5))
def test_hostile_bytes_give_packets_or_a_protocol_error(data: bytes, cut: int) -> None:
    whole: list[Packet] = []
    pieces: list[Packet] = []
    errors: list[str] = []
    for found, size in ((whole, len(data) or 1), (pieces, cut)):
        decoder = Decoder(100)
        try:
            for start in range(0, len(data), size):
                decoder.receive(data[start : start + size])
                while (packet := decoder.next_packet()) is not None:
                    found.append(packet)
            errors.append("")
        except PacketError as exc:
            errors.append(str(exc))
            with pytest.raises(PacketError):
                decoder.next_packet()
    assert whole == pieces
    assert errors[0] == errors[1]


@given(packets, st.data())
def test_a_damaged_packet_is_another_packet_or_a_protocol_error(
    packet: Packet, source: st.DataObject
) -> None:
    data = bytearray(encode(packet))
    place = source.draw(st.integers(0, len(data) - 1))
    data[place] ^= source.draw(st.integers(1, 255))
    try:
        decode(bytes(data))
    except PacketError:
        return


# Examples of the standard, and of the documents that describe the services.
GOLDEN = [
    (ConnAck(0), "20020000"),
    (ConnAck(1), "20020001"),
    (Connect("", keepalive=60), "100c00044d5154540402003c0000"),
    (
        Connect("c", "u", b"p", 10, will=WillMessage("w", b"x", 1, True)),
        "101900044d51545404ee000a000163000177000178000175000170",
    ),
    (Connect("c", protocol="MQIsdp", level=3), "100f00064d514973647003020000000163"),
    (Publish("a/b", b"hi"), "30070003612f626869"),
    (Publish("a/b", b"", 1, packet_id=10), "32070003612f62000a"),
    (Publish("a", b"", 2, retain=True, duplicate=True, packet_id=1), "3d050001610001"),
    (PubAck(258), "40020102"),
    (PubRel(1), "62020001"),
    (Subscribe(10, (("a/b", 1), ("c/d", 2))), "820e000a0003612f62010003632f6402"),
    (SubAck(10, (0, 2, 128)), "9005000a000280"),
    (Unsubscribe(10, ("a/b", "c/d")), "a20c000a0003612f620003632f64"),
    (UnsubAck(10), "b002000a"),
    (PingReq(), "c000"),
    (PingResp(), "d000"),
    (Disconnect(), "e000"),
]


@pytest.mark.parametrize(("packet", "wire"), GOLDEN, ids=lambda v: str(v)[:24])
def test_the_bytes_are_those_of_the_standard(packet: Packet, wire: str) -> None:
    data = bytes.fromhex(wire)
    assert encode(packet) == data
    assert decode(data) == [packet]


@pytest.mark.parametrize("size", [0, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152])
def test_lengths_at_their_edges(size: int) -> None:
    packet = Publish("t", b"x" * max(size - 3, 0))
    assert decode(encode(packet)) == [packet]


MALFORMED = {
    "a length of five bytes": "30ffffffff01",
    "type 0": "0000",
    "type 15": "f000",
    "qos 3": "3605000161000178",
    "dup at qos 0": "3803000161",
    "a topic beyond the packet": "30020005",
    "a topic with nul": "300300010 0".replace(" ", ""),
    "a topic that is not utf-8": "30040002c328",
    "a surrogate in a topic": "30050003eda080",
    "packet id 0": "320500016100 00".replace(" ", ""),
    "a publish without its id": "3203000161",
    "puback with flags": "41020001",
    "pubrel without flags": "60020001",
    "puback with id 0": "40020000",
    "a long puback": "4003000100",
    "a short puback": "400100",
    "subscribe without flags": "8006000100016100",
    "subscribe without filters": "82020001",
    "subscribe with qos 3": "8206000100016103",
    "subscribe without qos": "82050001000161",
    "unsubscribe without filters": "a2020001",
    "unsubscribe without flags": "a005000100 0161".replace(" ", ""),
    "a pingreq with a body": "c00100",
    "a disconnect with flags": "e100",
    "another protocol": "100c00044d5151540402003c0000",
    "the reserved flag": "100c00044d5154540403003c0000",
    "a will's qos without a will": "100c00044d515454040a003c0000",
    "a password alone": "100f00044d5154540442003c0000000170",
    "nul in the client id": "100d00044d5154540402003c000100",
    "bytes after connect": "100d00044d5154540402003c000000",
    "a connack with flags": "20020200",
    "a suback with code 3": "9003000103",
}


@pytest.mark.parametrize("wire", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_the_standard_forbids_is_a_protocol_error(wire: str) -> None:
    good = Publish("before", b"x")
    decoder = Decoder()
    decoder.receive(encode(good) + bytes.fromhex(wire))
    assert decoder.next_packet() == good
    with pytest.raises(PacketError):
        decoder.next_packet()
    with pytest.raises(PacketError):
        decoder.next_packet()


def test_a_service_may_forgive_the_flags_of_subscribe() -> None:
    for wire in (MALFORMED["subscribe without flags"], MALFORMED["unsubscribe without flags"]):
        decoder = Decoder(leniency=Leniency(subscribe_flags=True))
        decoder.receive(bytes.fromhex(wire))
        assert isinstance(decoder.next_packet(), (Subscribe, Unsubscribe))


def test_another_level_is_told_by_its_header_alone() -> None:
    # MQTT 5 puts properties where 3.1.1 has the client id.
    (found,) = decode(bytes.fromhex("101000044d5154540502003c032100140000"))
    assert isinstance(found, Connect)
    assert found.level == 5


def test_a_packet_over_the_limit_is_refused_on_its_header() -> None:
    decoder = Decoder(1000)
    decoder.receive(bytes.fromhex("30e907"))  # 1001
    with pytest.raises(PacketError, match="1001"):
        decoder.next_packet()
    assert decode(bytes.fromhex("30e807") + b"\0\0" + bytes(998), limit=1000)


def test_an_unfinished_packet_keeps_no_more_than_arrived() -> None:
    decoder = Decoder()
    decoder.receive(bytes.fromhex("30ffffff7f") + bytes(10))
    assert decoder.next_packet() is None
    assert decoder.buffered == 15


def test_a_large_packet_in_single_bytes_is_copied_once() -> None:
    data = encode(Publish("t", bytes(30_000)))
    decoder = Decoder()
    copied = 0
    found: list[Packet] = []
    for byte in data:
        decoder.receive(bytes((byte,)))
        copied += len(decoder._data)  # what was taken out of the unfinished rest
        packet = decoder.next_packet()
        if packet is not None:
            found.append(packet)
    assert len(found) == 1
    assert copied < len(data) + 20


def test_no_repr_shows_a_topic_or_a_password() -> None:
    shown = repr(Publish("secret-key/a/")) + repr(Connect("c", "u", b"hunter2"))
    shown += repr(Connect("c", will=WillMessage("secret-key/a/", b"")))
    assert "secret-key" not in shown
    assert "hunter2" not in shown
