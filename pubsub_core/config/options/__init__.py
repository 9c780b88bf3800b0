"""Options as one dataclass: from a URL, from TOML and from arguments, to help and schema.

For authors of backends, of servers and of plugins, who import from here. `parse_url` splits a
URL into an `Address` and the options in its query. `build` makes a frozen dataclass of options
from texts and native values alike; a key that it does not know is an error with a suggestion.
`field_help` and `json_schema` describe the same dataclass to people and to editors.

A program that reads a file of its own, such as a server's configuration, and does not build a
dataclass from it, raises `unknown_option` for each key that it does not know::

    for key in table:
        if key not in KNOWN:
            raise unknown_option(key, KNOWN, place=f"{path}: {key}", what="key")
"""

from .build import Resolve, build, split, structured, unknown_option
from .describe import FieldHelp, describe_type, field_help, json_schema, reference_schema
from .fields import accepts_table, accepts_text, field_types, inner_type, is_hidden, is_secret
from .url import parse_url

__all__ = [
    "FieldHelp",
    "Resolve",
    "accepts_table",
    "accepts_text",
    "build",
    "describe_type",
    "field_help",
    "field_types",
    "inner_type",
    "is_hidden",
    "is_secret",
    "json_schema",
    "parse_url",
    "reference_schema",
    "split",
    "structured",
    "unknown_option",
]
