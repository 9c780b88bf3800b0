"""The parts of one open bus. Only `pubsub_core.bus` imports them.

`engine` opens, closes and owns the parts; `session` keeps the connection up;
`broker_subscriptions`, `router`, `buffer` and `delivery` bring a frame to its consumers;
`publisher`, `outbox` and `deadlines` are the way out; `views` are presence and notifications,
`questions` authorization, and `hub` reports events.
"""

__all__: list[str] = []
