"""The bus without async: the same names, safe from any thread.

python plain.py
"""

from __future__ import annotations

import threading

from pubsub_core import Message, sync


def main() -> None:
    with sync.connect("memory://") as bus:
        done = threading.Event()

        def handle(message: Message[float]) -> None:
            print("handler:", message.topic, message.payload)
            done.set()

        with (
            bus.subscribe("lab/+/temp", float) as readings,
            bus.subscribe("lab/#", float, handler=handle),
        ):
            sender = threading.Thread(target=bus.publish, args=("lab/oven/temp", 81.5))
            sender.start()
            print("iterator:", readings.get(timeout=5).payload)
            sender.join()
            done.wait(5)


if __name__ == "__main__":
    main()
