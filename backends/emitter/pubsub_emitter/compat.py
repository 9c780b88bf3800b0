"""The import path of the API of ``emitter-io`` 1.x, which lives in `pubsub_emitter.client`."""

from __future__ import annotations

from pubsub_emitter.client.compat import Emitter, connect

__all__ = ["Emitter", "connect"]
