"""Variables ``PUBSUB_BUS_…`` find their bus, whatever their order."""

from __future__ import annotations

import itertools

import pytest

from pubsub_core.config.environment import sort_variables

REFERENCE = '{file = "/run/secrets/mqtt"}'


@pytest.mark.parametrize("key", ["PASSWORD", "WS_HEADERS", "ZONE"])
def test_a_table_beside_a_url_is_the_value_of_a_key(key: str) -> None:
    variables = {"PUBSUB_BUS_MAIN_URL": "mqtt://h", f"PUBSUB_BUS_MAIN_{key}": REFERENCE}
    for order in itertools.permutations(variables):
        made = sort_variables({name: variables[name] for name in order}, [])
        assert made.values == {"main": {"url": "mqtt://h", key.lower(): REFERENCE}}
        assert made.tables == {}


def test_a_table_of_no_known_bus_makes_one() -> None:
    made = sort_variables({"PUBSUB_BUS_EDGE": '{url = "memory://"}'}, [])
    assert made.tables == {"edge": '{url = "memory://"}'}


def test_the_longest_known_name_owns_a_variable() -> None:
    variables = {
        "PUBSUB_BUS_MAIN_URL": "memory://",
        "PUBSUB_BUS_MAIN_EDGE_URL": "mqtt://h",
        "PUBSUB_BUS_MAIN_EDGE_PASSWORD": REFERENCE,
    }
    made = sort_variables(variables, [])
    assert made.values["main_edge"] == {"url": "mqtt://h", "password": REFERENCE}
    assert made.values["main"] == {"url": "memory://"}
