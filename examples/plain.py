"""The bus without async: the same names, safe from any thread.

python plain.py
"""

from __future__ import annotations

import queue
import threading

from pubsub_core import Message, sync


def main() -> None:
    with sync.connect("main") as bus:
        handled: queue.Queue[Message[float]] = queue.Queue()

        def handle(message: Message[float]) -> None:
            handled.put(message)  # in a thread of the subscription's own

        with (
            bus.subscribe("lab/+/temp", float) as readings,
            bus.subscribe("lab/#", float, handler=handle),
        ):
            sender = threading.Thread(target=bus.publish, args=("lab/oven/temp", 81.5))
            sender.start()
            print("iterator:", readings.get(timeout=5).payload)
            message = handled.get(timeout=5)
            print("handler:", message.topic, message.payload)
            sender.join()


if __name__ == "__main__":
    main()
