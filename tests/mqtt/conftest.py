"""Fixtures of the MQTT tests."""

from __future__ import annotations

from tests.mqtt.lines import lines

__all__ = ["lines"]
