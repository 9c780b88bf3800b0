"""What ``docs/configuration.md`` shows."""

from __future__ import annotations

from pathlib import Path

from pubsub_core.plugins import Registry, use_registry
from pubsub_core.secrets import Secret
from tests.config.world import loaded
from tests.readme import Document
from tests.test_secrets import CANARY

PAGE = Document("docs/configuration.md")

pytestmark = PAGE.needed


def test_the_file_that_is_shown_works(tmp_path: Path) -> None:
    (text,) = PAGE.blocks("toml")
    with use_registry(Registry.load_installed({})):
        config = loaded(text, tmp_path, BROKER_PASSWORD=CANARY)
        assert config.lint() == []
        bus = config.bus("main")
        assert str(bus.address) == "mqtts://broker.example"
        assert bus.options.password == Secret(CANARY)
        assert loaded(text, tmp_path, PUBSUB_PROFILE="test").bus("main").info.name == "memory"


def test_the_code_that_is_shown_runs() -> None:
    _, code = PAGE.blocks("python")
    with use_registry(Registry.load_installed({})):
        PAGE.execute(code)
