"""The whole contract, in memory."""

from __future__ import annotations

from pubsub_core.memory import Space
from pubsub_core.testing import Harness, MemoryLink, Trial, suite

GUARDED = "guarded/topic"


def _prepare(trial: Trial) -> None:
    space = Space.named(trial.word)
    everything = ["#", "$conformance/#"]
    space.allow("tester", "right", publish=everything, subscribe=everything)
    space.allow(
        "guest",
        "right",
        publish=[f"{trial.word}/#"],
        subscribe=[f"{trial.word}/#", GUARDED],
        authorize=[],
    )
    trial.stack.callback(Space.forget, trial.word)


class TestMemory(suite("memory")):  # type: ignore[misc]  # the base is made at run time
    harness = Harness(
        url="memory://{unique}",
        options={"username": "tester", "password": "right", "guarded": ("guarded/#",)},
        second_identity={"username": "guest"},
        unprivileged_identity={"username": "guest"},
        wrong_identity={"password": "wrong"},
        authorizer_identity={"username": "tester"},
        guarded=GUARDED,
        native_type="pubsub_core.memory.backend:MemoryBackend",
        link=MemoryLink,
        rate={"rate": 20},
        prepare=_prepare,
    )
