"""Named buses from ``pubsub.toml``, profiles and the environment.

A value of a bus comes from the nearest of these layers that has it:

1. the argument of `pubsub_core.connect`;
2. a variable for one value, ``PUBSUB_BUS_MAIN_QOS=0``;
3. a variable for the bus, ``PUBSUB_BUS_MAIN='{url = "memory://"}'``;
4. the profile, ``[profile.test.bus.main]`` with ``PUBSUB_PROFILE=test``;
5. the file, ``[bus.main]``;
6. the default.

The options in a URL's query belong to the layer that gives the URL, below the keys that stand
beside it, and go with that URL when a nearer layer replaces it. A value is replaced whole:
tables are not mixed.

When a nearer layer's URL changes the backend, options of the replaced backend are set aside
rather than refused or carried over, so that one profile turns the same program to
``memory://`` and no password reaches a broker it was not meant for.
Secrets given by reference are fetched when the bus is built and not before, and those that
were set aside are never fetched.

Everything here is synchronous and may block: reading files, running a secret's command.
"""

from .answers import BusConfig, Explained, Finding, Source, SourceKind
from .config import Config

__all__ = ["BusConfig", "Config", "Explained", "Finding", "Source", "SourceKind"]
