"""The JSON Schema of ``pubsub.toml`` for the backends that are installed."""

from __future__ import annotations

import re
from typing import Any

from pubsub_core.plugins import Registry

from .bus_options import BusOptions
from .document import FILE_NAME
from .options import json_schema, reference_schema

__all__ = ["file_schema"]


def file_schema(installed: Registry) -> dict[str, Any]:
    """Return the schema for the backends of *installed*."""
    definitions: dict[str, Any] = {"reference": reference_schema()}
    general = json_schema(BusOptions)["properties"]
    by_url: list[dict[str, Any]] = []
    backends: list[dict[str, Any]] = []
    for info in installed.infos:
        name = f"backend-{info.name}"
        definitions[name] = {
            "title": info.about or info.name,
            "properties": json_schema(info.options)["properties"],
        }
        backends.append({"$ref": f"#/$defs/{name}"})
        pattern = "|".join(re.escape(scheme).replace(r"\-", "-") for scheme in info.schemes)
        by_url.append(
            {
                "if": {
                    "properties": {"url": {"type": "string", "pattern": f"^({pattern})://"}},
                    "required": ["url"],
                },
                "then": backends[-1],
            }
        )
    known = "|".join(
        re.escape(scheme).replace(r"\-", "-") for info in installed.infos for scheme in info.schemes
    )
    url: dict[str, Any] = {
        "description": "where the broker is, with options as ?name=value&…",
        "anyOf": [
            {"type": "string", "pattern": f"^({known})://"},
            {"$ref": "#/$defs/reference"},
        ],
    }
    bus: dict[str, Any] = {"type": "object", "properties": {"url": url, **general}}
    any_backend = {"anyOf": backends} if backends else {}
    by_url.append(
        {
            "if": {"properties": {"url": {"type": "string"}}, "required": ["url"]},
            "else": any_backend,
        }
    )
    definitions["bus"] = {**bus, "allOf": by_url, "unevaluatedProperties": False}
    # A file's bus may be completed or turned by a profile, and the other way round.
    table = {
        "type": "object",
        "propertyNames": {"pattern": "^[A-Za-z0-9_-]+$"},
        "additionalProperties": {"$ref": "#/$defs/bus"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": FILE_NAME,
        "type": "object",
        "properties": {
            "bus": {"description": "buses by name", **table},
            "profile": {
                "description": "laid over the buses when PUBSUB_PROFILE names it",
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "properties": {"bus": table},
                    "additionalProperties": False,
                },
            },
        },
        "additionalProperties": False,
        "$defs": definitions,
    }
