"""The configuration of a program: its file, its profile and its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pubsub_core.errors import ConfigError
from pubsub_core.plugins import registry

from .answers import BusConfig, Explained, Finding
from .document import Document, find, read
from .layers import Layers

__all__ = ["Config"]


class Config:
    """The configured buses. Its file is read at first need.

    A URL can be given wherever a name can; it needs no file and reads none. A value of a bus
    comes from the nearest layer that has it; `pubsub_core.config` lists them.
    """

    __slots__ = ("_document", "_environ", "_path", "profile")

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        *,
        profile: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Make one from *data*, shaped like the file, instead of a file.

        Args:
            data: The contents of the file; nothing by default.
            profile: Name of the profile to lay over it; by default ``PUBSUB_PROFILE``.
            environ: The environment; by default this process's, as it is now.
        """
        self._environ = dict(os.environ if environ is None else environ)
        self.profile = profile or self._environ.get("PUBSUB_PROFILE") or None
        self._path: Path | None = None
        self._document: Document | None = Document(None, data or {})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        profile: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        """Find ``pubsub.toml``: *path*, ``$PUBSUB_CONFIG``, or the first that exists.

        Looked at in this order: beside the program, the current directory,
        ``$XDG_CONFIG_HOME/pubsub`` (``~/.config/pubsub``). Without any, buses come from the
        environment alone. The file is read at first need.

        Raises:
            ConfigError: *path* is given and cannot be read, or is no TOML; the text names
                file, line and column.
        """
        config = cls(profile=profile, environ=environ)
        config._document = None
        if path is not None:
            config._path = Path(path).expanduser()
            config._document = read(config._path)
        return config

    def __repr__(self) -> str:
        path = self._document.path if self._document else self._path
        return f"<Config {path or 'not read'} profile={self.profile!r}>"

    @property
    def path(self) -> Path | None:
        """The file that is used, or None."""
        return self._read().path

    def buses(self) -> tuple[str, ...]:
        """Return the names of all buses, those of the file first.

        Raises:
            ConfigError: The file cannot be read or is no TOML.
        """
        return self._layers().names()

    def bus(self, where: str, overrides: Mapping[str, Any] | None = None) -> BusConfig:
        """Resolve a bus name or URL to everything a bus needs; may block for secrets.

        Args:
            where: A name, or a URL.
            overrides: Options that win over every other layer.

        Raises:
            ConfigError: The name is unknown, a value is bad, or a secret is not there.
            UnknownBackend: No installed backend answers to the URL's scheme.
            PluginError: The plugin that would, failed to load.
        """
        layers = self._layers(where)
        return layers.build(layers.plan(where, overrides or {}))

    def explain(self, where: str, overrides: Mapping[str, Any] | None = None) -> list[Explained]:
        """Tell each value of a bus and where it comes from; fetches no secret.

        Values are not checked; `lint` does that. An unknown key is told with a note. A URL
        that is a reference is only followed into the environment.

        Raises:
            ConfigError: The bus is unknown, or its URL does not lead to a backend.
        """
        from .explain import explain  # noqa: PLC0415 - as for `schema`

        return explain(self._layers(where).plan(where, overrides or {}, fetch=False))

    def lint(self) -> list[Finding]:
        """Check everything without connecting and without running a secret's command.

        Every bus is checked in every profile, with the environment as it is. A literal
        secret in a file that other users can read is a warning.
        """
        from .lint import finding, findings  # noqa: PLC0415 - as for `schema`

        try:
            layers = self._layers()
        except ConfigError as exc:
            return [finding(exc, "file")]
        return list(dict.fromkeys(findings(layers)))

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema (draft 2020-12) of ``pubsub.toml`` for the installed backends."""
        # Imported here: the command needs it, and a program that connects does not.
        from .schema import file_schema  # noqa: PLC0415 - see above

        return file_schema(registry())

    def _layers(self, where: str = "") -> Layers:
        document = Document(None, {}) if "://" in where else self._read()
        return Layers(document, self._environ, self.profile)

    def _read(self) -> Document:
        if self._document is None:
            if self._path is not None:
                self._document = read(self._path)
            else:
                path, looked = find(self._environ)
                self._document = read(path) if path else Document(None, {}, looked)
        return self._document
