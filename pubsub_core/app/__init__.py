"""An application: handlers declared once, run on whatever brokers the configuration says.

::

    app = App()

    @app.on("lab/{device}/temp")
    async def watch(message: Message[Reading], device: str, bus: Bus) -> None:
        if message.payload.celsius > 90:
            await bus.publish(f"alerts/{device}", "hot")

    if __name__ == "__main__":
        sys.exit(app.run())

The parameters of a handler are matched when the application starts, not per message; a
parameter that nothing fits is an error then:

=========================================  ================================================
parameter                                  gets
=========================================  ================================================
annotated ``Message`` or ``Message[T]``    the message, its payload decoded to ``T``
annotated ``Bus`` or ``SyncBus``           the handler's bus if it is called ``bus``, else
                                           the bus of that name; async handlers take
                                           ``Bus``, plain ones ``SyncBus``
named as a capture of the filter           the captured text, converted to the annotation
named ``message`` or ``msg``               the message
named ``payload``                          the payload, decoded to the annotation
named ``bus``                              the handler's bus
with a default value                       its default
=========================================  ================================================

An authorizer's parameters get buses and captures in the same way, and the request if they are
annotated ``AuthorizationRequest`` or called ``request``.
"""

from .application import App
from .running import Running

__all__ = ["App", "Running"]
