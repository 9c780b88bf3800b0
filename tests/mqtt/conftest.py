"""Fixtures of the MQTT tests."""

from __future__ import annotations

from tests.mqtt.drivers import silent
from tests.mqtt.lines import lines

__all__ = ["lines", "silent"]
