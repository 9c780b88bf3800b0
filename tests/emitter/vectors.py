"""The vectors of ``tests/data/emitter_vectors.json``, most of them from the Go broker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["FIXTURE", "KEYS", "LICENSE", "MASTER_KEY", "VECTORS"]

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "data" / "emitter_vectors.json").read_text()
)
FIXTURE: dict[str, Any] = VECTORS["test_fixture"]
LICENSE: str = FIXTURE["license"]
MASTER_KEY: str = FIXTURE["master_key"]
KEYS: dict[str, str] = FIXTURE["keys"]
