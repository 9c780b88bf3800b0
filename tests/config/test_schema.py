"""The JSON Schema of the file."""

from __future__ import annotations

import json
import re

from pubsub_core.config import Config
from pubsub_core.config.bus_options import BusOptions
from tests.config.world import AcmeOptions


def test_the_schema_is_assembled_from_all_backends() -> None:
    schema = Config(environ={}).schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"bus", "profile"}
    definitions = schema["$defs"]
    assert set(definitions) == {"backend-acme", "backend-memory", "bus", "reference"}
    assert set(definitions["backend-acme"]["properties"]) == {*AcmeOptions.__dataclass_fields__}
    bus = definitions["bus"]
    assert set(bus["properties"]) == {"url", *BusOptions.__dataclass_fields__}
    assert bus["unevaluatedProperties"] is False
    choice = bus["allOf"][0]
    pattern = choice["if"]["properties"]["url"]["pattern"]
    assert choice["then"] == {"$ref": "#/$defs/backend-acme"}
    for url in ("acme://h", "acmes://h", "acme+ws://h"):
        assert re.search(pattern, url)
    for url in ("memory://", "acmee://h", "xacme://h"):
        assert not re.search(pattern, url)


def test_every_reference_in_the_schema_leads_somewhere() -> None:
    schema = Config(environ={}).schema()
    text = json.dumps(schema)
    targets = set(re.findall(r'"\$ref": "#/\$defs/([^"]+)"', text))
    assert targets <= set(schema["$defs"])
    assert "reference" in targets
