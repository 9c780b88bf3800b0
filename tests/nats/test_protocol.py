"""The protocol without sockets: recorded bytes, every cut, hostile bytes, bounds."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_nats.errors import Refusal, fatal, refusal
from pubsub_nats.protocol import (
    MAX_HEADERS,
    MAX_LINE,
    Err,
    Event,
    Info,
    Msg,
    Ok,
    Parser,
    Ping,
    Pong,
    ProtocolError,
    encode_connect,
    encode_pub,
    encode_sub,
    encode_unsub,
    unquote,
)

INFO = b'INFO {"server_id":"N","version":"2.15.1","max_payload":1000,"headers":true}\r\n'

# As nats-server 2.15.1 sent it, but for its longer INFO.
SESSION = (
    INFO
    + b"PONG\r\n"
    + b"MSG a.b 2 5\r\nhello\r\n"
    + b"MSG a.b 3 _INBOX.x.1 0\r\n\r\n"
    + b"HMSG a.b 2 18 20\r\nNATS/1.0\r\na: b\r\n\r\nhi\r\n"
    + b"HMSG _INBOX.x.1 1 $JS.ACK.S.c.1.1.1.1.0 16 16\r\nNATS/1.0 503\r\n\r\n\r\n"
    + b"PING\r\n"
    + b"+OK\r\n"
    + b"-ERR 'Permissions Violation for Publish to \"no.X\"'\r\n"
    + b"MSG a\x0bb 4 3\r\n\r\nx\r\n"
    + b"MSG a\x0cb\x00\xff 4 1\r\n\n\r\n"
)
EVENTS: list[Event] = [
    Info({"server_id": "N", "version": "2.15.1", "max_payload": 1000, "headers": True}),
    Pong(),
    Msg(b"a.b", 2, b"", b"", b"hello"),
    Msg(b"a.b", 3, b"_INBOX.x.1", b"", b""),
    Msg(b"a.b", 2, b"", b"NATS/1.0\r\na: b\r\n\r\n", b"hi"),
    Msg(b"_INBOX.x.1", 1, b"$JS.ACK.S.c.1.1.1.1.0", b"NATS/1.0 503\r\n\r\n", b""),
    Ping(),
    Ok(),
    Err('Permissions Violation for Publish to "no.X"'),
    Msg(b"a\x0bb", 4, b"", b"", b"\r\nx"),
    Msg(b"a\x0cb\x00\xff", 4, b"", b"", b"\n"),
]


def parse(*chunks: bytes) -> list[Event]:
    parser = Parser()
    found: list[Event] = []
    for chunk in chunks:
        found.extend(parser.receive(chunk))
    assert not parser.pending
    return found


def broken(parser: Parser, wire: bytes, step: int, found: list[Event] | None = None) -> bool:
    """Feed *wire* in pieces; return whether it broke the protocol, with the events before."""
    events = [] if found is None else found
    try:
        for at in range(0, len(wire), step):
            for event in parser.receive(wire[at : at + step]):
                events.append(event)
    except ProtocolError:
        return True
    return False


def test_a_session_at_once() -> None:
    assert parse(SESSION) == EVENTS


def test_a_session_cut_at_every_byte() -> None:
    for cut in range(1, len(SESSION)):
        assert parse(SESSION[:cut], SESSION[cut:]) == EVENTS, cut


def test_a_session_byte_by_byte() -> None:
    assert parse(*(SESSION[at : at + 1] for at in range(len(SESSION)))) == EVENTS


@given(st.lists(st.integers(1, len(SESSION) - 1), max_size=20))
def test_a_session_in_any_pieces(cuts: list[int]) -> None:
    edges = [0, *sorted(set(cuts)), len(SESSION)]
    pieces = [SESSION[a:b] for a, b in itertools.pairwise(edges)]
    assert parse(*pieces) == EVENTS


SUBJECTS = st.binary(min_size=1, max_size=30).filter(
    lambda raw: not any(each in raw for each in b" \r\n\t")
)


@given(st.lists(st.tuples(SUBJECTS, st.binary(max_size=60), st.binary(max_size=40)), max_size=8))
def test_no_subject_shifts_a_field(messages: list[tuple[bytes, bytes, bytes]]) -> None:
    wire = INFO
    for subject, payload, header in messages:
        if header:
            total = len(header) + len(payload)
            wire += b"HMSG %b 7 %d %d\r\n" % (subject, len(header), total) + header
        else:
            wire += b"MSG %b 7 %d\r\n" % (subject, len(payload))
        wire += payload + b"\r\n"
    found = parse(wire)[1:]
    assert found == [Msg(subject, 7, b"", header, payload) for subject, payload, header in messages]


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"H",
        b"\x16\x03\x01",
        b"MSG a 1 0\r\n\r\n",
        b"PING\r\n",
        b"INFO nothing\r\n",
        b"INFO []\r\n",
        b"INFO " + b"[" * 100_000 + b"\r\n",
        b'INFO {"max_payload":-1}\r\n',
        b'INFO {"max_payload":"x"}\r\n',
        INFO + b"WHAT\r\n",
        INFO + b"\r\n",
        INFO + b"PUB a 1\r\nx\r\n",
        INFO + b"MSG a 1\r\n",
        INFO + b"MSG a 1 2 3 4\r\n",
        INFO + b"MSG a x 1\r\nx\r\n",
        INFO + b"MSG a 1 -1\r\n",
        INFO + b"MSG a 1 +1\r\nx\r\n",
        INFO + b"MSG a 1 1_0\r\n0123456789\r\n",
        INFO + b"MSG a 1 " + b"9" * 5000 + b"\r\n",
        INFO + b"MSG a 1 %d\r\n" % (1000 + MAX_HEADERS + 1),
        INFO + b"MSG a 1 1\r\nxyz",
        INFO + b"MSG  a 1 1 1\r\nx\r\n",
        INFO + b"HMSG a 1 5 4\r\nxxxx\r\n",
        INFO + b"HMSG a 1 5\r\n",
        INFO + b"HMSG a 1 0 %d\r\n" % (1000 + MAX_HEADERS + 1),
        INFO + b"PING" + b"x" * (MAX_LINE + 1),
        INFO + b"MSG " + b"x" * (MAX_LINE + 1) + b" 1 0\r\n\r\n",
    ],
    ids=lambda wire: ascii(wire[-24:]),
)
def test_what_no_server_sends_ends_the_session(wire: bytes) -> None:
    for step in (len(wire), 7):
        parser = Parser()
        assert broken(parser, wire, step)
        with pytest.raises(ProtocolError):
            list(parser.receive(b"PING\r\n"))


def test_good_events_come_before_the_bad_bytes() -> None:
    parser = Parser()
    found: list[Event] = []
    wire = INFO + b"PONG\r\nMSG a 1 1\r\nx\r\nWHAT\r\n"
    assert broken(parser, wire, len(wire), found)
    assert found == [EVENTS[0], Pong(), Msg(b"a", 1, b"", b"", b"x")]


@given(st.lists(st.binary(max_size=60), max_size=8), st.booleans())
def test_any_bytes_raise_nothing_but_protocol_errors(chunks: list[bytes], greeted: bool) -> None:
    parser = Parser()
    try:
        if greeted:
            list(parser.receive(INFO))
        for chunk in chunks:
            list(parser.receive(chunk))
    except ProtocolError:
        pass
    assert parser.pending <= MAX_LINE + 60


LINES = st.sampled_from(
    [
        b"MSG a 1 3",
        b"MSG a 1 r 3",
        b"HMSG a 1 2 3",
        b"PING",
        b"PONG",
        b"-ERR 'x'",
        b"+OK",
        INFO[:-2],
    ]
)


@given(st.lists(st.tuples(LINES, st.binary(max_size=6)), max_size=12), st.integers(1, 9))
def test_almost_right_bytes_do_the_same_in_any_pieces(
    lines: list[tuple[bytes, bytes]], step: int
) -> None:
    wire = INFO + b"".join(line + b"\r\n" + rest for line, rest in lines)

    def outcome(size: int) -> tuple[list[Event], bool]:
        found: list[Event] = []
        return found, broken(Parser(), wire, size, found)

    whole, cut = outcome(len(wire)), outcome(step)
    assert whole == cut


def test_a_large_message_in_small_pieces_costs_its_size_only() -> None:
    parser = Parser()
    list(parser.receive(b'INFO {"max_payload":8000000}\r\n'))
    piece = bytes(65536)
    list(parser.receive(b"MSG a 1 %d\r\n" % (100 * len(piece))))
    tracemalloc.start()
    try:
        for _ in range(100):
            assert not list(parser.receive(piece))
        (message,) = parser.receive(b"\r\n")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(message, Msg)
    assert len(message.payload) == 100 * len(piece)
    assert peak < 4 * len(message.payload)


def test_the_size_is_checked_before_memory_is_taken() -> None:
    parser = Parser()
    list(parser.receive(INFO))
    with pytest.raises(ProtocolError, match="announced 1000"):
        list(parser.receive(b"MSG a 1 2000000000\r\n"))
    assert not parser.pending


def test_what_was_taken_before_the_server_allowed_less_is_still_read() -> None:
    parser = Parser()
    list(parser.receive(INFO + b'INFO {"max_payload":10}\r\n'))
    (message,) = parser.receive(b"MSG a 1 900\r\n" + bytes(900) + b"\r\n")
    assert isinstance(message, Msg)


def test_commands_look_as_the_protocol_says() -> None:
    assert encode_pub(b"a.b", b"hi") == b"PUB a.b 2\r\nhi\r\n"
    assert encode_pub(b"a", b"", reply=b"r") == b"PUB a r 0\r\n\r\n"
    assert encode_pub(b"a", b"hi", b"NATS/1.0\r\n\r\n") == (
        b"HPUB a 12 14\r\nNATS/1.0\r\n\r\nhi\r\n"
    )
    assert encode_pub(b"a", b"hi", b"NATS/1.0\r\n\r\n", b"r") == (
        b"HPUB a r 12 14\r\nNATS/1.0\r\n\r\nhi\r\n"
    )
    assert encode_sub(b"a.>", 4) == b"SUB a.> 4\r\n"
    assert encode_sub(b"a", 4, b"g") == b"SUB a g 4\r\n"
    assert encode_unsub(4) == b"UNSUB 4\r\n"
    assert encode_connect({"verbose": False}) == b'CONNECT {"verbose":false}\r\n'


def test_refusals_keep_the_subject_as_it_was() -> None:
    assert refusal('Permissions Violation for Publish to "no.X"') == Refusal("publish", b"no.X")
    assert refusal(r'Permissions Violation for Publish to "a\vb\"c\\"') == Refusal(
        "publish", b'a\x0bb"c\\'
    )
    assert refusal('Permissions Violation for Subscription to "ü.>" using queue "G"') == Refusal(
        "subscription", "ü.>".encode(), b"G"
    )
    assert refusal("maximum subscriptions exceeded") == Refusal("limit")
    assert refusal("Authorization Violation") is None


@pytest.mark.parametrize(
    ("quoted", "plain"),
    [(r"a\x7fb", "a\x7fb"), (r"\u2028", "\u2028"), (r"\U0001f600", "\U0001f600"), (r"\q", "q")],
)
def test_quoted_text_is_read(quoted: str, plain: str) -> None:
    assert unquote(quoted) == plain


@given(st.text(max_size=300))
def test_texts_of_a_peer_are_shown_on_one_line(text: str) -> None:
    refusal(text)
    shown = str(fatal(text, "host:1"))
    assert len(shown) < 400
    assert shown.isprintable()
