"""Topics and subjects: the vectors of the server's MQTT gateway, and the bijection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_core.errors import InvalidFilter, InvalidTopic
from pubsub_nats.subjects import MAX_SUBJECT, Subjects, subject_of, subjects_of, topic_of

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "data" / "nats_vectors.json").read_text()
)


def text(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else value["repeat"] * value["count"]


def test_topics_become_subjects_and_come_back() -> None:
    pairs = VECTORS["topic_subject"]
    assert len(pairs) == 140
    for pair in pairs:
        assert subject_of(pair["topic"]) == pair["subject"]
        assert topic_of(pair["subject"]) == pair["topic"]


def test_filters_become_one_or_two_subjects() -> None:
    for each in VECTORS["filter_subjects"]:
        assert list(subjects_of(each["filter"])) == each["subjects"]


def test_subjects_outside_of_the_image_have_no_topic() -> None:
    subjects = Subjects()
    for each in VECTORS["subjects_without_topic"]:
        wire = bytes.fromhex(each["subject_hex"]) if "subject_hex" in each else None
        assert subjects.topic(wire or each["subject"].encode()) is None, each


def test_subjects_that_only_others_publish_to_have_a_topic() -> None:
    for each in VECTORS["subjects_with_topic_from_others"]:
        assert topic_of(each["subject"]) == each["topic"]


@pytest.mark.parametrize("vector", VECTORS["invalid_topics"], ids=lambda v: ascii(v["topic"])[:20])
def test_impossible_topics_are_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(InvalidTopic) as caught:
        Subjects().subject(text(vector["topic"]))
    assert not isinstance(caught.value, InvalidFilter)
    assert caught.value.reason == vector["reason"]
    assert caught.value.level == vector.get("level")
    if "character" in vector:
        assert caught.value.character == vector["character"]
    assert caught.value.hint
    assert caught.value.backend == "nats"


@pytest.mark.parametrize("vector", VECTORS["invalid_filters"], ids=lambda v: v["filter"])
def test_impossible_filters_are_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(InvalidFilter) as caught:
        Subjects().filters(vector["filter"])
    assert (caught.value.reason, caught.value.level) == (vector["reason"], vector["level"])


LEVELS = st.text(
    st.characters(exclude_characters="/ \t\n\x0b\f\r\x7f\0", exclude_categories=["Cs"]), max_size=6
).filter(lambda level: level not in ("*", ">"))
TOPICS = (
    st.lists(LEVELS, min_size=1, max_size=6)
    .map("/".join)
    .filter(
        lambda topic: (
            bool(topic)
            and not topic.startswith("$")
            and topic.split("/")[0] not in ("_INBOX", "_R_", "_GR_")
        )
    )
)


@given(TOPICS)
def test_the_mapping_is_a_bijection(topic: str) -> None:
    subject = subject_of(topic)
    assert topic_of(subject) == topic
    assert all(subject.split(".")), "no empty token"


@given(st.text("ab./*>$", min_size=1, max_size=8))
def test_a_subject_with_a_topic_is_the_one_of_that_topic(subject: str) -> None:
    topic = topic_of(subject)
    if topic is not None:
        assert subject_of(topic) == subject


def test_a_prefix_is_a_namespace() -> None:
    subjects = Subjects("my.app/x")
    assert subjects.subject("a/b") == b"my//app.x.a.b"
    assert subjects.topic(b"my//app.x.a.b") == "a/b"
    assert subjects.topic(b"other.x.a.b") is None
    assert subjects.topic(b"my//app.x") is None
    assert subjects.filters("#") == (b"my//app.x.>",)
    assert subjects.filters("a/#") == (b"my//app.x.a", b"my//app.x.a.>")


def test_the_prefix_counts_for_the_length() -> None:
    subjects = Subjects("p" * 10)
    assert subjects.subject("a" * (MAX_SUBJECT - 11))
    with pytest.raises(InvalidTopic, match="bytes"):
        subjects.subject("a" * (MAX_SUBJECT - 10))


def test_what_is_kept_is_bounded() -> None:
    subjects = Subjects()
    for number in range(25_000):
        subjects.subject(f"n/{number}")
        subjects.topic(b"n.%d" % number)
    assert len(subjects._subjects) <= 10_000
    assert len(subjects._topics) <= 10_000
