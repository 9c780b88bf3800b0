"""What runs inside one open bus. Only `pubsub_core.bus` imports it.

`engine` opens, closes and owns the parts; `session` keeps the connection up;
`broker_subscriptions`, `router`, `buffer` and `delivery` bring a frame to its consumers;
`publisher`, `outbox` and `deadlines` are the way out; `views` and `questions` answer who is
subscribed and who may see what; `hub` tells events.
"""

__all__: list[str] = []
