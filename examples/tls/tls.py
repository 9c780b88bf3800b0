"""MQTT over TLS: an own authority, a client certificate, user name and password.

    MQTT_PASSWORD=… python tls.py mqtts://broker.example --ca ca.pem --user oven-7
    python tls.py mqtts://broker.example --ca ca.pem --cert me.crt --key me.key

The chain and the host name are always verified; that needs no option. The same options stand in
``pubsub.toml`` as ``ca_file``, ``cert_file``, ``key_file`` and
``password = { env = "MQTT_PASSWORD" }``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from typing import Any

from pubsub_core import ConnectError, Secret, connect


async def main() -> None:
    parser = argparse.ArgumentParser(description="Say hello over TLS.")
    parser.add_argument("url")
    parser.add_argument("--ca", help="PEM file of the authority; the system's by default")
    parser.add_argument("--cert", help="our certificate, for brokers that want one")
    parser.add_argument("--key", help="its private key")
    parser.add_argument("--user", help="the password is taken from MQTT_PASSWORD")
    arguments = parser.parse_args()
    given = {
        "ca_file": arguments.ca,
        "cert_file": arguments.cert,
        "key_file": arguments.key,
        "username": arguments.user,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value}
    if password := os.environ.get("MQTT_PASSWORD"):
        options["password"] = Secret(password)  # masked wherever it could be shown
    async with connect(arguments.url, connect_timeout=5, **options) as bus:
        async with bus.subscribe("example/hello", str) as hellos:
            await bus.publish("example/hello", "hello")
            print((await hellos.get(timeout=5)).payload, "over", arguments.url.partition(":")[0])


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except ConnectError as error:  # TLSProblem and AuthenticationFailed are two of these
        sys.exit(f"{error.code}: {error}")
