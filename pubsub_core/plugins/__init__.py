"""Which backends, codecs, middleware and kinds of secrets are installed.

A plugin is a module named by an entry point of the group ``pubsub_core``::

    [project.entry-points.pubsub_core]
    acme = "pubsub_acme.plugin"

Plugins are loaded here one by one, rather than by pluggy's own loader, which stops at the
first that fails. A failure is kept as a `PluginError` and raised when that plugin's scheme or
name is asked for; everything else goes on working. pluggy checks and calls the hooks at
registration, and nothing else: no message passes through it.

Environment: ``PUBSUB_PLUGINS=a,b`` loads only these entry points;
``PUBSUB_STRICT_PLUGINS=1`` makes any failure an error at once.
"""

from .inspection import BUS_OPTIONS, GROUP, clashes
from .installed import (
    PluginRecord,
    Registry,
    load_object,
    registry,
    reset_registry,
    use_registry,
)

__all__ = [
    "BUS_OPTIONS",
    "GROUP",
    "PluginRecord",
    "Registry",
    "clashes",
    "load_object",
    "registry",
    "reset_registry",
    "use_registry",
]
