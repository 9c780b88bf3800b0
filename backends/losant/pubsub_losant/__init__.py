"""Losant devices: state and commands, over MQTT."""

from __future__ import annotations

__all__: list[str] = []
