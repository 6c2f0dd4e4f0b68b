"""Events from and to other services, on NATS, Kafka, RabbitMQ and Redis. FastStream carries them.

    bridge = Bridge(bus, source="/orders")
    bridge.forward(OrderPlaced, broker.publisher("orders.placed", stream=orders))

It runs on asyncio only, because FastStream does. On trio, use `eventkit.wire` and a client of your
choice.
"""

from eventkit.exceptions import BridgeError, not_installed

try:
    from eventkit.faststream._bridge import Bridge
except ModuleNotFoundError as _missing:
    raise not_installed(__name__, _missing.name or "faststream", "faststream") from _missing

__all__ = ["Bridge", "BridgeError"]
