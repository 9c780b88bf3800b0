"""The former home of `pubsub_core.config.options`; it goes when nothing uses it."""

from .config.options import *  # noqa: F403
from .config.options import __all__  # noqa: F401
