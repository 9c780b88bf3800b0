"""Emitter for pubsub_core: licenses, keys and the protocol of an Emitter broker."""

from __future__ import annotations

from .keys import InvalidKey, InvalidLicense, InvalidTarget, Key, License, Permission

__all__ = ["InvalidKey", "InvalidLicense", "InvalidTarget", "Key", "License", "Permission"]
