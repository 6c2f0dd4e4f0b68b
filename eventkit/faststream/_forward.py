"""Owns the handler that sends an event to a broker, with the ids and headers of its unit of work.

Knows nothing of consumers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from faststream.exceptions import IncorrectState
from structlog.contextvars import get_contextvars

from eventkit._core.ambient import carried, current_delivery
from eventkit._core.events import DomainEvent
from eventkit._core.loops.running import on_trio
from eventkit._core.observers import contained
from eventkit._core.state import BusState
from eventkit.exceptions import BridgeError
from eventkit.faststream._engines import LONGEST_ID, Engine, plain
from eventkit.wire import encode, wire_name

E = TypeVar("E")

# The names of the id that all log lines of one request share. The first one found is sent.
CORRELATION = ("correlation_id", "request_id")
# Characters. W3C Trace Context: at least 512 of `tracestate` should be sent on.
_LONGEST_CARRIED = 512
_LONGEST_ADDED = 8192  # characters. W3C Baggage: up to 8192 bytes have to be sent on.


class Forward(Generic[E]):
    """Sends the events of one class. It is an ordinary handler.

    It succeeds when the broker has confirmed the message.

    Args:
        event_type: The class. A subclass needs a name and a forward of its own.
        publisher: A publisher of FastStream. Any: each broker has its own class.
        engine: The engine of the publisher's broker.
        source: The name of this service in its messages.
        key: Returns the same `str` for events that belong together.
        state: The state of the bus. Its observers add headers.
    """

    def __init__(
        self,
        event_type: type[E],
        publisher: Any,
        engine: Engine,
        source: str,
        key: Callable[[E], str | None] | None,
        state: BusState,
    ) -> None:
        self._event_type = event_type
        self._publisher = publisher
        self._engine = engine
        self._source = source
        self._key = key
        self._state = state

    async def __call__(self, event: E) -> None:
        """Send one event.

        Raises:
            BridgeError: The broker has not confirmed the message.
            EventEncodingError: The event cannot be written as JSON.
        """
        if type(event) is not self._event_type:
            kind = type(event).__qualname__
            raise BridgeError(
                f"{kind} is a subclass of {self._event_type.__qualname__}: forward the subclass "
                "under its own name"
            )
        if on_trio():
            raise BridgeError(
                "FastStream works on asyncio only: on trio, send the result of "
                "eventkit.wire.encode() with a client of your own"
            )
        delivery = current_delivery()
        wired = encode(
            event,
            source=self._source,
            id=str(delivery.event_id),
            key=None if self._key is None else self._key(event),
            time=None if isinstance(event, DomainEvent) else delivery.published_at,
        )
        options = self._engine.options(self._publisher, wired, self._carried(event))
        await send(
            self._publisher,
            self._engine,
            wired.body,
            options | {"correlation_id": _correlation_id()},
        )

    def _carried(self, event: E) -> dict[str, str]:
        """Return the carried headers of the unit of work, and the headers of observers."""
        along = {name: plain(value, _LONGEST_CARRIED) for name, value in carried.get().items()}
        added: dict[str, str] = {}
        for observer in self._state.observers.headers:
            with contained(observer):
                added.update(observer.headers(event))
        if "traceparent" in added:  # the carried `tracestate` belongs to another `traceparent`
            along.pop("tracestate", None)
        return along | {name: plain(value, _LONGEST_ADDED) for name, value in added.items()}

    def __repr__(self) -> str:
        return f"<Forward of {wire_name(self._event_type)} to {self._engine.name}>"


async def send(publisher: Any, engine: Engine, body: bytes, options: dict[str, Any]) -> None:
    """Publish a message, and check that the broker has confirmed it.

    Raises:
        BridgeError: The broker has not confirmed the message, or is not started.
    """
    try:
        result = await publisher.publish(body, **options)
    except IncorrectState as error:
        raise BridgeError(
            "the broker is not started: await broker.start() in the application's lifespan"
        ) from error
    if publisher.is_test:  # a test broker confirms nothing
        return
    refusal = engine.refusal(result)
    if refusal is not None:
        raise BridgeError(f"the broker has not accepted the message: {refusal}")


def _correlation_id() -> str | None:
    """Return the id of the unit of work in logs; None if there is none: FastStream then makes one.

    The id may come from a header of a request, so it may have any characters and any length.
    """
    bound = get_contextvars()
    ids = (plain(str(bound[name]), LONGEST_ID) for name in CORRELATION if name in bound)
    return next(ids, None) or None
