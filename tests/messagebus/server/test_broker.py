"""The distributor's routing, one statement each; then any sequence, beside a naive model."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pubsub_messagebus.protocol import (
    HEARTBEAT,
    ProtocolError,
    encode_authorization_request,
    encode_forwarded_multicast,
    encode_forwarded_subscription,
    encode_forwarded_unicast,
    notice,
)
from pubsub_messagebus.server.broker import MAX_FENCES, Broker
from pubsub_messagebus.server.interactors import Identity
from pubsub_messagebus.server.roles import FeedPolicy, Permissions, Policy, Role, RoleChange
from tests.messagebus.vectors import CAPTURES
from tests.messagebus.world import World, packet, texts

NO_AUTHORIZE = RoleChange(deny=Role.AUTHORIZE)


def authorized(*, broker: dict[str, Any] | None = None, **more: Any) -> World:
    """Return a world where feed F needs authorization, which only user "auth" may give."""
    feeds = {
        "F": FeedPolicy(
            is_authorized=True,
            change=NO_AUTHORIZE,
            users={("*", "auth"): RoleChange(allow=Role.AUTHORIZE)},
        )
    }
    return World(Broker(Policy(feeds=feeds, **more), **(broker or {})))


# --- routing -----------------------------------------------------------------------------


def test_a_subscriber_gets_what_is_published_there_with_the_publishers_name() -> None:
    world = World()
    world.connect("s", "p")
    world.add("s", "F", "T")
    for topic in ("T", "U", "t", "", "T "):
        seen = world.publish("p", "F", topic, [packet("x")])
        assert [name for name, _ in seen] == (["s"] if topic == "T" else [])
    world.publish("p", "f", "T")
    assert not world.raw
    ((_, message),) = world.publish("p", "F", "T", [packet("x", 4)], flag=True)
    assert message == {
        "type": 8,
        "user": "p",
        "host": "host-p",
        "feed": "F",
        "topic": "T",
        "is_image": True,
        "data_packets": [{"entitlements": [4], "data": b"x".hex()}],
    }


@pytest.mark.parametrize("topic", [".*", "*", "FOO.*", "#", "+", ""])
def test_names_match_only_themselves(topic: str) -> None:
    world = World()
    world.connect("s", "p")
    world.add("s", "F", topic)
    assert not world.publish("p", "F", "FOO")
    assert not world.publish("p", "F", "FOO.BAR")
    assert len(world.publish("p", "F", topic)) == 1


def test_adds_are_counted_and_deliver_once() -> None:
    world = World()
    world.connect("s", "p")
    world.add("s")
    world.add("s")
    assert len(world.publish("p")) == 1
    world.remove("s")
    assert len(world.publish("p")) == 1
    world.remove("s")
    assert not world.publish("p")


def test_one_remove_undoes_one_add() -> None:
    # The original goes on delivering (D1).
    world = World()
    world.connect("s", "p")
    world.add("s")
    world.remove("s")
    assert not world.publish("p")


def test_a_publisher_receives_its_own_messages_if_it_subscribes() -> None:
    world = World()
    world.connect("p")
    world.add("p")
    assert [name for name, _ in world.publish("p")] == ["p"]


def test_publishing_to_nobody_has_no_effect() -> None:
    world = World()
    world.connect("p", "s")
    assert world.publish("p") == []
    world.add("s")
    # Nor does it make a publisher of record.
    assert world.leave("p") == []


def test_unicast_reaches_only_its_target_and_only_where_it_subscribed() -> None:
    world = World()
    world.connect("s", "other", "p")
    world.add("s")
    world.add("other")
    ((name, message),) = world.unicast("p", "s", packets=[packet("image")])
    assert name == "s"
    assert message["client_id"] == str(world.ids["s"])
    assert message["user"] == "p"
    assert message["is_image"] is True
    assert not world.unicast("p", "s", "F", "U")
    assert not world.unicast("p", "p")
    assert not world.unicast("p", uuid.uuid4())
    world.remove("s")
    assert not world.unicast("p", "s")


def test_forwarded_frames_are_the_publishers_name_and_its_body() -> None:
    world = World()
    world.connect("s", "p")
    world.add("s")
    packets = [packet("a", 1), packet("b")]
    world.publish("p", packets=packets)
    assert world.raw == [("s", encode_forwarded_multicast("p", "host-p", "F", "T", False, packets))]
    world.unicast("p", "s", packets=packets)
    assert world.raw == [
        (
            "s",
            encode_forwarded_unicast("p", "host-p", world.ids["s"], "F", "T", True, packets),
        )
    ]


def test_select_feed_every_newcomer_gets_one_image() -> None:
    world = World()
    world.connect("p")
    world.listen("p")
    images: list[str] = []
    for number in range(1000):
        name = f"s{number}"
        world.connect(name)
        ((listener, told),) = world.add(name)
        assert listener == "p"
        assert told["is_add"]
        # Recorded before it was told: the image finds its target.
        ((target, _),) = world.unicast("p", uuid.UUID(told["client_id"]), packets=[packet("i")])
        images.append(target)
    assert images == [f"s{number}" for number in range(1000)]


def test_dialects_are_bridged() -> None:
    world = World()
    world.connect("old", "publisher")
    world.connect("new", "modern", dialect="content_type")
    world.add("old")
    world.add("new")
    both = dict(world.publish("publisher", packets=[packet("x", 1)], flag=True))
    assert both["old"]["is_image"] is True
    assert both["new"]["content_type"] == ""
    assert both["new"]["data_packets"] == both["old"]["data_packets"]
    both = dict(world.publish("modern", packets=[packet("y")], flag="text/plain"))
    assert both["old"]["is_image"] is False
    assert both["new"]["content_type"] == "text/plain"
    ((_, one),) = world.unicast("modern", "old", flag="text/plain", packets=[packet("z")])
    assert one["is_image"] is False
    # A server's own notices are images where there are such.
    world.leave("publisher")
    notices = dict(world.leave("modern"))
    assert notices["old"]["is_image"] is True
    assert notices["new"]["content_type"] == ""


# --- notifications -----------------------------------------------------------------------


def test_a_listener_is_told_what_exists_in_order_and_only_once() -> None:
    world = World()
    world.connect("a", "b", "c", "l")
    world.add("b", "F", "T2")
    world.add("a", "F", "T1")
    world.add("c", "F", "T2")
    world.add("c", "F", "T2")
    world.add("c", "G", "T1")
    seen = world.listen("l")
    assert [(told["user"], told["topic"], told["is_add"]) for _, told in seen] == [
        ("b", "T2", True),
        ("c", "T2", True),
        ("a", "T1", True),
    ]
    assert world.listen("l") == []
    world.listen("l", is_add=False)
    assert len(world.listen("l")) == 3


def test_every_request_is_told_and_a_disconnect_once_per_topic() -> None:
    world = World()
    world.connect("s", "l")
    world.listen("l")
    assert [told["is_add"] for _ in range(3) for _, told in world.add("s")] == [True] * 3
    world.add("s", "F", "U")
    assert [told["is_add"] for _, told in world.remove("s")] == [False]
    # Not subscribed: nothing to tell (D2).
    assert world.remove("s", "F", "never") == []
    assert [(told["topic"], told["is_add"]) for _, told in world.leave("s")] == [
        ("T", False),
        ("U", False),
    ]


def test_a_notification_has_the_recorded_bytes() -> None:
    world = World()
    world.connect("s", "l")
    world.listen("l")
    world.add("s")
    told = encode_forwarded_subscription("s", "host-s", world.ids["s"], "F", "T", True)
    assert world.raw == [("l", told)]


def test_no_notifications_after_they_are_removed() -> None:
    world = World()
    world.connect("s", "l")
    world.listen("l")
    world.listen("l", is_add=False)
    assert world.add("s") == []
    assert world.listen("l", "never", is_add=False) == []


def test_a_listener_is_told_of_itself_but_not_of_its_end() -> None:
    world = World()
    world.connect("l", "other")
    world.listen("l")
    world.listen("other")
    assert [name for name, _ in world.add("l")] == ["l", "other"]
    assert [name for name, _ in world.leave("l")] == ["other"]


# --- stale topics and the end of a connection ----------------------------------------------


def test_the_last_publisher_of_a_topic_leaves_a_notice() -> None:
    world = World()
    world.connect("s", "p1", "p2")
    world.add("s")
    world.publish("p1")
    world.publish("p2")
    assert world.leave("p1") == []
    assert [name for name, _ in world.leave("p2")] == ["s"]
    assert world.raw == [("s", notice("F", "T"))]
    recorded = next(each for each in CAPTURES if "stale" in each["id"])
    feed, topic = recorded["decoded"]["feed"], recorded["decoded"]["topic"]
    assert notice(feed, topic, recorded["dialect"]).hex() == recorded["hex"]


def test_unicast_makes_a_publisher_too() -> None:
    world = World()
    world.connect("s", "p")
    world.add("s")
    world.unicast("p", "s")
    assert world.leave("p")[0][1]["user"] == ""


def test_stale_notices_come_before_removals() -> None:
    world = World()
    world.connect("o", "p")
    for topic in ("A", "B"):
        world.add("o", "F", topic)
        world.publish("p", "F", topic)
    for topic in ("Z1", "Z2"):
        world.add("p", "F", topic)
    world.listen("o")
    assert [(told["type"], told["topic"]) for _, told in world.leave("p")] == [
        (8, "A"),
        (8, "B"),
        (3, "Z1"),
        (3, "Z2"),
    ]
    assert world.leave("p") == []


def test_the_end_of_everybody_leaves_nothing() -> None:
    world = authorized()
    world.connect("auth", "s", "p")
    world.add("s")
    world.answer("auth", "s", {1})
    world.add("p")
    world.add("s", "G")
    world.publish("s", "G")
    world.listen("p", "G")
    for name in ("s", "auth", "p"):
        world.leave(name)
    assert world.broker.empty
    stats = world.broker.stats
    assert (stats.clients, stats.subscriptions, stats.listeners, stats.pending) == (0, 0, 0, 0)


def test_a_message_for_clients_is_ignored() -> None:
    world = World()
    world.connect("s", "p")
    world.add("s")
    for wire in (
        encode_forwarded_multicast("u", "h", "F", "T", False, None),
        encode_forwarded_subscription("u", "h", world.ids["s"], "F", "T", True),
        encode_authorization_request(world.ids["s"], "h", "u", "F", "T"),
    ):
        assert world.send("p", wire) == []
    assert world.broker.stats.ignored == 3


def test_heartbeats_reach_their_subscribers() -> None:
    world = World()
    world.connect("s", "other")
    world.connect("new", dialect="content_type")
    assert world.heartbeat() == []
    world.add("s", "__admin__", "heartbeat")
    world.add("new", "__admin__", "heartbeat")
    world.heartbeat()
    assert world.raw == [("s", HEARTBEAT["is_image"]), ("new", HEARTBEAT["content_type"])]
    # Clients cannot pretend to be the server (D17).
    assert world.publish("other", "__admin__", "heartbeat") == []
    assert world.unicast("other", "s", "__admin__", "heartbeat") == []


# --- authorization -----------------------------------------------------------------------


def test_a_subscription_that_needs_authorization_waits_for_it() -> None:
    world = authorized()
    world.connect("auth", "s", "p", "l")
    world.listen("l")
    ((name, asked),) = world.add("s")
    assert name == "auth"
    assert asked == {
        "type": 6,
        "client_id": str(world.ids["s"]),
        "host": "host-s",
        "user": "s",
        "feed": "F",
        "topic": "T",
    }
    assert world.raw[0][1] == encode_authorization_request(world.ids["s"], "host-s", "s", "F", "T")
    assert not world.publish("p", packets=[packet("x", 1)])
    assert not world.unicast("p", "s", packets=[packet("x", 1)])
    # Asked again while it waits: one request, carrying two adds.
    assert world.add("s") == []
    ((name, told),) = world.answer("auth", "s", {1})
    assert (name, told["type"], told["is_add"]) == ("l", 3, True)
    assert world.broker.subscribers("F", "T") == {"s": 2}


def test_packets_pass_if_all_they_need_is_held() -> None:
    world = authorized()
    world.connect("auth", "s", "p")
    world.add("s")
    world.answer("auth", "s", {1, 2})
    sent = [
        packet("1", 1),
        packet("2", 2),
        packet("3", 3),
        packet("13", 1, 3),
        packet("12", 1, 2),
        packet("none"),
    ]
    ((_, message),) = world.publish("p", packets=sent)
    assert texts(message) == ["1", "2", "12"]
    ((_, message),) = world.unicast("p", "s", packets=sent)
    assert texts(message) == ["1", "2", "12"]
    # Nothing left: it comes without packets, but with its publisher.
    ((_, message),) = world.publish("p", packets=[packet("3", 3)])
    assert message["data_packets"] is None
    assert (message["user"], message["host"]) == ("p", "host-p")
    # No packets at all does no harm, as it does to the original up to 5.1.1.
    ((_, message),) = world.publish("p", packets=None)
    assert message["data_packets"] is None


def test_filtering_follows_the_recording() -> None:
    recorded = next(
        each
        for each in CAPTURES
        if each["id"].endswith("/entitlement-filtered") and each["dialect"] == "is_image"
    )
    feed = recorded["decoded"]["feed"]
    world = World(Broker(Policy(feeds={feed: FeedPolicy(is_authorized=True)})))
    host = recorded["decoded"]["host"]
    world.connect("s")
    world.connect("p", identity=Identity(user="pub", host=host))
    world.add("s", feed)
    world.answer("p", "s", {1, 2}, feed)
    world.send("p", bytes.fromhex(recorded["caused_by_hex"]))
    # The order within a set is free.
    ((_, frame),) = world.raw
    assert sorted(frame) == sorted(bytes.fromhex(recorded["hex"]))


def test_denial_is_told_to_the_subscriber_alone() -> None:
    world = authorized()
    world.connect("auth", "s", "l", "p")
    world.listen("l")
    world.add("s")
    assert [name for name, _ in world.answer("auth", "s", None)] == ["s"]
    assert world.raw == [("s", notice("F", "T"))]
    assert not world.publish("p", packets=[packet("x", 1)])
    # A no is not remembered as a grant of nothing: it is asked again (D5).
    assert [told["type"] for _, told in world.add("s")] == [6]


def test_not_required_means_unfiltered() -> None:
    world = authorized()
    world.connect("auth", "s", "p")
    world.add("s")
    world.answer("auth", "s", {9}, required=False)
    ((_, message),) = world.publish("p", packets=[packet("a"), packet("b", 1)])
    assert texts(message) == ["a", "b"]


def test_a_new_answer_takes_effect_at_once_and_tells_nobody() -> None:
    world = authorized()
    world.connect("auth", "s", "p", "l")
    world.listen("l")
    world.add("s")
    world.answer("auth", "s", {1})
    assert world.answer("auth", "s", {2}) == []  # D3
    ((_, message),) = world.publish("p", packets=[packet("1", 1), packet("2", 2)])
    assert texts(message) == ["2"]
    assert world.answer("auth", "s", None, required=False) == []
    ((_, message),) = world.publish("p", packets=[packet("1", 1), packet("none")])
    assert texts(message) == ["1", "none"]


def test_revoking_ends_the_subscription() -> None:
    world = authorized()
    world.connect("auth", "s", "p", "l")
    world.listen("l")
    world.add("s")
    world.add("s")
    world.answer("auth", "s", {1})
    seen = world.answer("auth", "s", None)
    assert [(name, told["type"]) for name, told in seen] == [("s", 8), ("l", 3)]
    assert seen[1][1]["is_add"] is False
    assert not world.publish("p", packets=[packet("1", 1)])
    # A later grant brings it back without being asked.
    ((name, told),) = world.answer("auth", "s", {1})
    assert (name, told["is_add"]) == ("l", True)
    assert world.broker.subscribers("F", "T") == {"s": 2}


def test_a_grant_is_remembered_for_the_connection() -> None:
    world = authorized()
    world.connect("auth", "s", "p")
    world.add("s")
    world.answer("auth", "s", {1})
    world.remove("s")
    world.leave("auth")
    assert world.add("s") == []
    assert len(world.publish("p", packets=[packet("1", 1)])) == 1
    # But only for that topic.
    world.add("s", "F", "U")
    assert not world.publish("p", "F", "U", [packet("1", 1)])


def test_a_grant_after_anothers_denial_subscribes() -> None:
    world = authorized()
    world.connect("auth")
    world.connect("auth2", identity=Identity(user="auth"))
    world.connect("s", "p")
    assert [name for name, _ in world.add("s")] == ["auth", "auth2"]
    world.answer("auth", "s", None)
    world.answer("auth2", "s", {1})
    assert len(world.publish("p", packets=[packet("1", 1)])) == 1


def test_only_an_authorizer_may_answer_and_only_what_was_asked() -> None:
    world = authorized()
    world.connect("auth", "s", "p")
    world.add("s")
    assert world.answer("p", "s", {1}) == []
    assert world.answer("s", "s", {1}) == []
    assert not world.publish("p", packets=[packet("1", 1)])
    # Nobody can be made to subscribe.
    assert world.answer("auth", "p", {1}) == []
    assert world.answer("auth", "s", {1}, "F", "U") == []
    assert world.broker.subscribers("F", "U") == {}


def test_who_authorizes_later_is_asked_what_waits() -> None:
    world = authorized()
    world.connect("s", "other")
    assert world.add("s") == []
    world.add("other")
    world.add("other")
    world.leave("other")
    ((name, asked),) = world.connect("auth")
    assert (name, asked["user"]) == ("auth", "s")
    world.leave("auth")
    # It left without an answer; the next one is asked as well.
    world.connect("third", identity=Identity(user="auth"))
    assert world.raw[0][1][0] == 6


def test_taking_back_what_waits() -> None:
    world = authorized()
    world.connect("auth", "s", "p", "l")
    world.listen("l")
    world.add("s")
    world.add("s")
    assert world.remove("s") == []
    assert world.remove("s") == []
    # Nothing waits any more, so a late answer does nothing.
    assert world.answer("auth", "s", {1}) == []
    assert not world.publish("p", packets=[packet("1", 1)])


def test_what_waits_is_bounded() -> None:
    world = authorized(broker={"max_pending": 3})
    world.connect("s")
    for number in range(5):
        world.add("s", "F", str(number))
    assert world.broker.stats.pending == 3
    assert world.broker.stats.ignored == 2
    assert len(world.connect("auth")) == 3


def test_one_connection_cannot_hold_everything() -> None:
    world = World(Broker(max_interests=3))
    world.connect("s")
    for number in range(3):
        world.add("s", "F", str(number))
    with pytest.raises(ProtocolError, match="more than 3"):
        world.add("s", "F", "4")
    with pytest.raises(ProtocolError):
        world.listen("s", "F")
    world.add("s", "F", "1")


def test_the_heartbeat_needs_no_authorization() -> None:
    world = World(Broker(Policy(is_authorization_required=True)))
    world.connect("s")
    world.add("s", "__admin__", "heartbeat")
    assert len(world.heartbeat()) == 1


def test_a_fence_needs_no_authorization_and_carries_no_data() -> None:
    world = World(Broker(Policy(is_authorization_required=True)))
    world.connect("s", "other")
    feed = f"__sync__{uuid.uuid4()}/1"
    assert world.listen("s", feed) == []
    ((name, told),) = world.add("s", feed, "x")
    assert (name, told["client_id"]) == ("s", str(world.ids["s"]))
    # What needs no authorization must be no way around it.
    packets = [packet("x")]
    assert world.publish("other", feed, "x", packets) == []
    assert world.unicast("other", "s", feed, "x", packets) == []
    assert world.publish("s", feed, "x", packets) == []
    assert [seen["type"] for _, seen in world.add("s", "__syn")] == [6, 6]
    assert world.broker.stats.pending == 1


def test_fences_are_for_everybody_and_tell_nobody_else() -> None:
    policy = Policy(change=RoleChange(Role.NONE, Role.ALL), is_authorization_required=True)
    world = World(Broker(policy))
    world.connect("a", "b")
    assert world.listen("a", "__sync__") == []
    assert world.listen("b", "__sync__") == []
    # Nobody learns of others, or a feed that needs no role would be a way around the roles.
    for _ in range(2):
        ((name, told),) = world.add("a", "__sync__", "a message to b")
        assert (name, told["client_id"], told["is_add"]) == ("a", str(world.ids["a"]), True)
    ((name, told),) = world.remove("a", "__sync__", "a message to b")
    assert (name, told["is_add"]) == ("a", False)
    assert world.listen("b", "__sync__", is_add=False) == []
    assert world.listen("b", "__sync__") == [], "nor does a listing show them"
    ((name, _),) = world.add("b", "__sync__", "x")
    assert name == "b"
    assert world.leave("a") == []
    assert world.add("b", "F", "T") == world.publish("b", "F", "T") == []
    world.leave("b")
    assert world.broker.empty


def test_fences_of_one_connection_are_bounded() -> None:
    world = World()
    world.connect("s")
    for number in range(MAX_FENCES):
        world.add("s", f"__sync__{number}", "x")
        world.remove("s", f"__sync__{number}", "x")
    for number in range(MAX_FENCES - 1):
        world.add("s", f"__sync__{number}", "x")
    world.listen("s", "__sync__0")
    world.add("s", "F", "T")
    with pytest.raises(ProtocolError, match="fences"):
        world.add("s", "__sync__", "x")
    world.listen("s", "__sync__0", is_add=False)
    assert world.add("s", "__sync__", "x") == []
    assert world.broker.subscribers("__sync__", "x")


# --- roles and identities ----------------------------------------------------------------


def test_what_a_role_lacks_is_ignored() -> None:
    feeds = {
        name: FeedPolicy(change=RoleChange(deny=role))
        for name, role in (
            ("noSubscribe", Role.SUBSCRIBE),
            ("noPublish", Role.PUBLISH),
            ("noNotify", Role.NOTIFY),
        )
    }
    world = World(Broker(Policy(feeds=feeds)))
    world.connect("s", "p")
    world.listen("p", "noSubscribe")
    assert world.add("s", "noSubscribe") == []
    assert world.remove("s", "noSubscribe") == []
    assert world.broker.subscribers("noSubscribe", "T") == {}
    world.add("s", "noPublish")
    assert world.publish("p", "noPublish") == []
    assert world.unicast("p", "s", "noPublish") == []
    world.add("s", "noNotify")
    assert world.listen("p", "noNotify") == []
    assert world.add("s", "noNotify") == []


def test_roles_override_each_other_from_server_to_user() -> None:
    policy = Policy.from_mapping(
        {
            "allow": ["Subscribe", "Publish"],
            "deny": "Publish",
            "feedRoles": {
                "F": {
                    "isAuthorized": True,
                    "allow": ["Publish", "Notify"],
                    "deny": ["Subscribe"],
                    "interactorRoles": {
                        "*": {"tom": {"allow": ["Authorize"]}},
                        "hostA": {"tom": {"allow": ["All"], "deny": ["Notify"]}},
                    },
                }
            },
        }
    )
    assert policy.roles("G", "tom", "h") == Role.SUBSCRIBE
    assert policy.roles("F", "dick", "h") == Role.PUBLISH | Role.NOTIFY
    assert policy.roles("F", "tom", "h") == Role.PUBLISH | Role.NOTIFY | Role.AUTHORIZE
    assert policy.roles("F", "tom", "hostA") == Role.ALL & ~Role.NOTIFY
    assert policy.authorization_required("F")
    assert not policy.authorization_required("G")


def test_a_users_own_permissions_go_by_host_pattern() -> None:
    permissions: Permissions = {
        "F": {
            "HOST-?": RoleChange(deny=Role.PUBLISH),
            "*": RoleChange(deny=Role.ALL),
        },
        "G": {"elsewhere": RoleChange()},
    }
    policy = Policy()
    assert policy.roles("F", "tom", "host-a", permissions) == Role.ALL & ~Role.PUBLISH
    assert policy.roles("F", "tom", "other", permissions) == Role.NONE
    assert policy.roles("G", "tom", "host-a", permissions) == Role.NONE
    assert policy.roles("H", "tom", "host-a", permissions) == Role.ALL


def test_standing_for_somebody_counts_only_where_it_is_allowed() -> None:
    feeds = {
        "F": FeedPolicy(is_impersonation_allowed=True, is_proxy_allowed=True),
        "G": FeedPolicy(),
    }
    world = World(Broker(Policy(feeds=feeds)))
    world.connect("s", "l")
    identity = Identity(user="tom", host="h", impersonating="dick", forwarded_for="hostB")
    world.connect("p", identity=identity)
    for feed, user, host in (("F", "dick", "hostB"), ("G", "tom", "h"), ("H", "tom", "h")):
        world.add("s", feed)
        ((_, message),) = world.publish("p", feed)
        assert (message["user"], message["host"]) == (user, host)
        world.listen("l", feed)
        ((_, told),) = world.add("p", feed)
        assert (told["user"], told["host"]) == (user, host)
    everywhere = World(Broker(Policy(is_impersonation_allowed=True, is_proxy_allowed=True)))
    everywhere.connect("s")
    everywhere.connect("p", identity=identity)
    everywhere.add("s")
    ((_, message),) = everywhere.publish("p")
    assert (message["user"], message["host"]) == ("dick", "hostB")


# --- any sequence, beside a naive model --------------------------------------------------

CONNS = st.sampled_from("abcd")
FEEDS = st.sampled_from("FG")  # F needs authorization, G does not
TOPICS = st.sampled_from("TU")
RIGHTS = st.none() | st.sets(st.integers(1, 3), min_size=1)
SENT = st.none() | st.lists(
    st.tuples(st.sampled_from("xyz"), st.sets(st.integers(1, 3))), min_size=1, max_size=3
)


class Model:
    """Lists and loops: what the specification says, word by word."""

    def __init__(self) -> None:
        self.online: list[str] = []
        self.subscribed: list[dict[str, Any]] = []  # conn, feed, topic, count, rights
        self.listening: list[tuple[str, str]] = []
        self.published: list[tuple[str, str, str]] = []
        self.rights: dict[tuple[str, str, str], set[int] | None] = {}
        self.waiting: dict[tuple[str, str, str], int] = {}
        self.refused: dict[tuple[str, str, str], int] = {}

    def find(self, conn: str, feed: str, topic: str) -> dict[str, Any] | None:
        for each in self.subscribed:
            if (each["conn"], each["feed"], each["topic"]) == (conn, feed, topic):
                return each
        return None

    def told(self, conn: str, feed: str, topic: str, is_add: bool) -> list[Any]:
        return [(who, 3, conn, feed, topic, is_add) for who, at in self.listening if at == feed]

    def start(self, conn: str, feed: str, topic: str, count: int, rights: Any) -> list[Any]:
        self.subscribed.append(
            {"conn": conn, "feed": feed, "topic": topic, "count": count, "rights": rights}
        )
        return self.told(conn, feed, topic, True)

    def connect(self, conn: str) -> list[Any]:
        self.online.append(conn)
        if conn != "a":
            return []
        return [("a", 6, c, f, t) for c, f, t in self.waiting]

    def add(self, conn: str, feed: str, topic: str) -> list[Any]:
        key = (conn, feed, topic)
        found = self.find(*key)
        if found:
            found["count"] += 1
            return self.told(*key, True)
        if feed != "F":
            return self.start(*key, 1, None)
        if key in self.rights:
            return self.start(*key, 1, self.rights[key])
        if key in self.waiting:
            self.waiting[key] += 1
            return []
        self.refused.pop(key, None)
        self.waiting[key] = 1
        return [("a", 6, *key)] if "a" in self.online else []

    def remove(self, conn: str, feed: str, topic: str) -> list[Any]:
        key = (conn, feed, topic)
        found = self.find(*key)
        if found:
            found["count"] -= 1
            if not found["count"]:
                self.subscribed.remove(found)
            return self.told(*key, False)
        for counts in (self.waiting, self.refused):
            if key in counts:
                counts[key] -= 1
                if not counts[key]:
                    del counts[key]
        return []

    def listen(self, conn: str, feed: str) -> list[Any]:
        if (conn, feed) in self.listening:
            return []
        self.listening.append((conn, feed))
        return [
            (conn, 3, each["conn"], feed, each["topic"], True)
            for each in self.subscribed
            if each["feed"] == feed
        ]

    def publish(self, conn: str, feed: str, topic: str, sent: Any, to: str | None) -> list[Any]:
        result: list[Any] = []
        for each in self.subscribed:
            if (each["feed"], each["topic"]) != (feed, topic) or to not in (None, each["conn"]):
                continue
            parts = sent
            if each["rights"] is not None:
                parts = [p for p in sent or () if p[1] and p[1] <= each["rights"]] or None
            result.append((each["conn"], 8 if to is None else 9, conn, feed, topic, parts))
        if result and (conn, feed, topic) not in self.published:
            self.published.append((conn, feed, topic))
        return result

    def answer(
        self, conn: str, feed: str, topic: str, rights: set[int] | None, required: bool
    ) -> list[Any]:
        key = (conn, feed, topic)
        if key not in self.waiting and key not in self.rights and key not in self.refused:
            return []
        found = self.find(*key)
        if required and not rights:
            self.rights.pop(key, None)
            if found:
                self.refused[key] = found["count"]
                self.subscribed.remove(found)
                return [(conn, "notice", feed, topic), *self.told(*key, False)]
            if key in self.waiting:
                self.refused[key] = self.waiting.pop(key)
                return [(conn, "notice", feed, topic)]
            return []
        self.rights[key] = rights if required else None
        if found:
            found["rights"] = self.rights[key]
            return []
        count = self.waiting.pop(key, 0) or self.refused.get(key, 0)
        self.refused.pop(key, None)
        return self.start(*key, count, self.rights[key]) if count else []

    def leave(self, conn: str) -> list[Any]:
        self.online.remove(conn)
        self.listening = [each for each in self.listening if each[0] != conn]
        for counts in (self.rights, self.waiting, self.refused):
            for key in [key for key in counts if key[0] == conn]:
                del counts[key]
        result: list[Any] = []
        mine = [each for each in self.published if each[0] == conn]
        self.published = [each for each in self.published if each[0] != conn]
        for _, feed, topic in mine:
            if not any(each[1:] == (feed, topic) for each in self.published):
                result += [
                    (each["conn"], "notice", feed, topic)
                    for each in self.subscribed
                    if (each["feed"], each["topic"]) == (feed, topic) and each["conn"] != conn
                ]
        gone = [each for each in self.subscribed if each["conn"] == conn]
        self.subscribed = [each for each in self.subscribed if each["conn"] != conn]
        for each in gone:
            result += self.told(conn, each["feed"], each["topic"], False)
        return result


def in_words(world: World, seen: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    names = {str(identifier): name for name, identifier in world.ids.items()}
    result: list[Any] = []
    for conn, message in seen:
        where = (message["feed"], message["topic"])
        match message["type"]:
            case 3:
                result.append((conn, 3, names[message["client_id"]], *where, message["is_add"]))
            case 6:
                result.append((conn, 6, names[message["client_id"]], *where))
            case 8 if not message["user"]:
                result.append((conn, "notice", *where))
            case kind:
                parts = message["data_packets"] and [
                    (bytes.fromhex(each["data"]).decode(), set(each["entitlements"] or ()))
                    for each in message["data_packets"]
                ]
                result.append((conn, kind, message["user"], *where, parts))
    return result


def in_order_per_connection(effects: list[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for conn, *rest in effects:
        found.setdefault(conn, []).append(rest)
    return found


class BrokerMachine(RuleBasedStateMachine):
    """Connection "a" is the authorizer of feed F; it, too, comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        feeds = {
            "F": FeedPolicy(
                is_authorized=True,
                change=NO_AUTHORIZE,
                users={("*", "a"): RoleChange(allow=Role.AUTHORIZE)},
            )
        }
        self.world = World(Broker(Policy(feeds=feeds)))
        self.model = Model()

    def same(self, seen: list[Any], wanted: list[Any], *, any_order: bool = False) -> None:
        ours = in_order_per_connection(in_words(self.world, seen))
        theirs = in_order_per_connection(wanted)
        if any_order:  # a replay goes by topic, the model's list by time
            ours = {conn: sorted(each) for conn, each in ours.items()}
            theirs = {conn: sorted(each) for conn, each in theirs.items()}
        assert ours == theirs

    @rule(conn=CONNS)
    def come_or_go(self, conn: str) -> None:
        if conn in self.model.online:
            self.same(self.world.leave(conn), self.model.leave(conn))
        else:
            wanted = self.model.connect(conn)
            self.same(self.world.connect(conn), wanted)

    @precondition(lambda self: self.model.online)
    @rule(data=st.data(), feed=FEEDS, topic=TOPICS)
    def subscribe(self, data: st.DataObject, feed: str, topic: str) -> None:
        conn = data.draw(st.sampled_from(self.model.online))
        self.same(self.world.add(conn, feed, topic), self.model.add(conn, feed, topic))

    @precondition(lambda self: self.model.online)
    @rule(data=st.data(), feed=FEEDS, topic=TOPICS)
    def unsubscribe(self, data: st.DataObject, feed: str, topic: str) -> None:
        conn = data.draw(st.sampled_from(self.model.online))
        self.same(self.world.remove(conn, feed, topic), self.model.remove(conn, feed, topic))

    @precondition(lambda self: self.model.online)
    @rule(data=st.data(), feed=FEEDS)
    def listen(self, data: st.DataObject, feed: str) -> None:
        conn = data.draw(st.sampled_from(self.model.online))
        self.same(self.world.listen(conn, feed), self.model.listen(conn, feed), any_order=True)

    @precondition(lambda self: self.model.online)
    @rule(data=st.data(), feed=FEEDS)
    def stop_listening(self, data: st.DataObject, feed: str) -> None:
        conn = data.draw(st.sampled_from(self.model.online))
        assert self.world.listen(conn, feed, is_add=False) == []
        self.model.listening = [e for e in self.model.listening if e != (conn, feed)]

    @precondition(lambda self: self.model.online)
    @rule(data=st.data(), feed=FEEDS, topic=TOPICS, sent=SENT)
    def multicast(self, data: st.DataObject, feed: str, topic: str, sent: Any) -> None:
        conn = data.draw(st.sampled_from(self.model.online))
        packets = sent and [packet(text, *needed) for text, needed in sent]
        self.same(
            self.world.publish(conn, feed, topic, packets),
            self.model.publish(conn, feed, topic, sent, None),
        )

    @precondition(lambda self: self.model.online)
    @rule(data=st.data(), to=CONNS, feed=FEEDS, topic=TOPICS, sent=SENT)
    def unicast(self, data: st.DataObject, to: str, feed: str, topic: str, sent: Any) -> None:
        conn = data.draw(st.sampled_from(self.model.online))
        target: str | uuid.UUID = to if to in self.world.ids else uuid.uuid4()
        packets = sent and [packet(text, *needed) for text, needed in sent]
        self.same(
            self.world.unicast(conn, target, feed, topic, packets),
            self.model.publish(conn, feed, topic, sent, to),
        )

    @precondition(lambda self: "a" in self.model.online)
    @rule(data=st.data(), topic=TOPICS, rights=RIGHTS, required=st.booleans())
    def authorize(self, data: st.DataObject, topic: str, rights: Any, required: bool) -> None:
        conn = data.draw(st.sampled_from(self.model.online))
        self.same(
            self.world.answer("a", conn, rights, "F", topic, required),
            self.model.answer(conn, "F", topic, rights, required),
        )

    @invariant()
    def the_counts_agree(self) -> None:
        stats = self.world.broker.stats
        assert stats.clients == len(self.model.online)
        assert stats.subscriptions == len(self.model.subscribed)
        assert stats.listeners == len(self.model.listening)
        assert stats.pending == len(self.model.waiting)
        for feed in "FG":
            for topic in "TU":
                assert self.world.broker.subscribers(feed, topic) == {
                    each["conn"]: each["count"]
                    for each in self.model.subscribed
                    if (each["feed"], each["topic"]) == (feed, topic)
                }

    def teardown(self) -> None:
        for conn in tuple(self.model.online):
            self.same(self.world.leave(conn), self.model.leave(conn))
        assert self.world.broker.empty


TestAnySequence = BrokerMachine.TestCase
TestAnySequence.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


@pytest.mark.slow
class TestManySequences(BrokerMachine.TestCase):  # type: ignore[valid-type,misc]  # made at run time
    settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
