"""The former home of `pubsub_core.config.bus_options`; it goes when nothing uses it."""

from .codecs import CodecRule
from .config.bus_options import BusOptions, OfflineOverflow, OfflinePolicy, OverflowPolicy

__all__ = ["BusOptions", "CodecRule", "OfflineOverflow", "OfflinePolicy", "OverflowPolicy"]
