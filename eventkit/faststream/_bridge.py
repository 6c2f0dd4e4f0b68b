"""Owns the bridge between a bus and brokers: what users wire, and what it is made of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, TypeVar, Union

from faststream import AckPolicy
from pydantic import GetCoreSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, core_schema
from stamina import AsyncRetryingCaller

from eventkit._core.bus import EventBus, state_of
from eventkit._core.context import dispatch
from eventkit._core.durable import Durable, as_durable
from eventkit._core.events import Incoming
from eventkit._core.state import BusState
from eventkit._core.subscriptions import Subscription
from eventkit._core.turns import together
from eventkit.exceptions import BridgeError
from eventkit.faststream._consumer import Consumer, Deliver
from eventkit.faststream._deliver import ToHandlers, ToKeeper
from eventkit.faststream._forward import Forward
from eventkit.faststream._wiring import (
    Group,
    check_dead_letter,
    check_options,
    check_publisher,
    check_type,
    check_types,
    group_of,
    note_consumed,
    note_forwarded,
)
from eventkit.wire import Received, wire_name
from eventkit.wire._probe import language_of

E = TypeVar("E")

_WITHIN = 25.0  # seconds
_DELIVERIES = 10
_ATTEMPTS = 4  # after the first one
_UNKEEPABLE = (ValueError, TypeError)  # of an event or an id that no table can hold


class Bridge:
    """Sends events of a bus to brokers, and gives it events of other services.

        bridge = Bridge(bus, source="/orders")
        bridge.forward(OrderPlaced, broker.publisher("orders.placed", stream=orders))
        bridge.consume(
            broker.subscriber("bills.paid", stream=bills, durable="orders", pull_sub=True),
            BillPaid,
            dead_letter=broker.publisher("dead.orders", stream=dead),
        )

    Publishers and subscribers are FastStream's own, with all of its options: those of NATS
    JetStream, RabbitMQ, Redis streams, and Kafka by aiokafka. The application starts and stops the
    broker in its lifespan. asyncio only, as FastStream.

    Wire at import, as you subscribe handlers: what would lose messages is refused there, and not by
    the first message. A bridge holds nothing that is bound to an event loop.

    Args:
        bus: Whose events they are.
        source: What this service is called in its messages, a URI reference such as "/orders".

    Raises:
        TypeError: `bus` is no EventBus.
        ValueError: `source` is no text, or empty.
    """

    def __init__(self, bus: EventBus, *, source: str) -> None:
        if not isinstance(bus, EventBus):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Bridge() takes an EventBus first, not {bus!r}")
        if not source or not isinstance(source, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f'source is what this service is called, "/orders", not {source!r}')
        self._bus = bus
        self._source = source

    def __repr__(self) -> str:
        return f"<Bridge of {self._bus!r} as {self._source!r}>"

    def forward(
        self,
        event_type: type[E],
        publisher: Any,  # Any: one of FastStream's, which has a class for each broker
        *,
        key: Callable[[E], str | None] | None = None,
        name: str | None = None,
        timeout: float = 10.0,
        durable: bool | Durable = False,
    ) -> Subscription:
        """Send the events of a class to a broker.

            bridge.forward(OrderPlaced, broker.publisher("orders.placed", stream=orders))

        This is a handler like any other: it fails alone, and is logged, counted and explained as
        others are. It has succeeded when the broker has confirmed the message.

        An event is sent at most once. With `durable=` it is sent at least once: again and again
        until the broker has confirmed it, also after a crash. Events of up to `concurrency`
        requests are sent at the same time, so the order of requests is not kept. `key` and
        `durable=` together keep it per key.

        Args:
            event_type: Named with `named`. Events of subclasses fail: they have names of their own.
            publisher: Of a started broker, by the time of the first event.
            key: Called with the event; returns the same for events that belong together. It is the
                key of Kafka's record. With `durable=` it is also the key of `Durable`: events with
                an equal key are sent one at a time, in the order of their commits.
            name: Of the handler, in logs and stored rows. By default `forward:` and the event's.
            timeout: Seconds until the broker has to have confirmed.
            durable: As for `EventBus.subscribe`.

        Returns:
            The subscription; `cancel()` ends it.

        Raises:
            BridgeError: The class has no name or cannot be written, or is consumed on this bus, or
                the publisher confirms nothing.
            TypeError: `key` is no function.
            ValueError: `key` is given here and in `Durable`.
        """
        check_type(event_type)
        engine = check_publisher(publisher)
        if key is not None and not callable(key):
            raise TypeError(f"key takes a function from the event to a text, not {key!r}")
        options = as_durable(durable)
        if options is not None and key is not None:
            if options.key is not None:
                raise ValueError("key is given twice: to forward(), and to Durable()")
            options = replace(options, key=key)
        note_forwarded(self._bus, event_type)
        return self._bus.subscribe(
            event_type,
            Forward(event_type, publisher, engine, self._source, key, state_of(self._bus)).__call__,
            name=name or f"forward:{wire_name(event_type)}",
            timeout=timeout,
            durable=options or False,
        )

    def consume(
        self,
        subscriber: Any,  # Any: as above
        *event_types: type,
        dead_letter: Any,  # Any: as above
        others: Literal["dead", "ignore"] = "dead",
        within: float | None = None,
        retry: AsyncRetryingCaller | None = None,
        max_deliveries: int | None = None,
        durable: bool = False,
        deliver: Callable[[Received], Awaitable[object]] | None = None,
    ) -> None:
        """Give the bus what a subscriber receives; it is acknowledged when the handlers have ended.

            bridge.consume(subscriber, OrderPlaced, dead_letter=broker.publisher("dead.billing"))

        Handlers run at least once: all of them again if one fails, and after a crash. After five
        attempts, or `within` seconds, the message becomes a dead letter. A handler may raise two
        exceptions of FastStream's: `RejectMessage` for a dead letter at once, and `NackMessage` to
        hand the message back, so that it comes again. In a handler
        `current_delivery().event_id` is the message's id, and `.received` has its headers.

        With `durable=True` the bus's outbox keeps the event, and the message is acknowledged after
        that commit. A message that comes again is dropped. Each durable handler is tried again
        alone, as its `Durable` says; the others run at most once.

        Args:
            subscriber: One without a handler. Or a list of those that belong together: with Redis
                one that reads, and one with `min_idle_time`, which takes over from dead processes.
            event_types: All that may come to the subscriber, each named with `named`.
            dead_letter: A publisher for what cannot be handled. It has the message as it came, and
                the headers `eventkit-reason`, `eventkit-error` and `eventkit-consumer`.
            others: Whether messages of other types become dead letters, or are acknowledged and
                forgotten.
            within: Seconds for all attempts together, 25 by default. Has to be less than the broker
                waits before it gives the message to another process.
            retry: The attempts after the first one: how many, and with which pauses. The first of
                them follows at once. By default four, with stamina's pauses.
            max_deliveries: How often the broker may give out a message, 10 by default; then it is a
                dead letter. Crashes and `NackMessage` count alike. Kafka and the classic queues of
                RabbitMQ do not count.
            durable: Whether the outbox keeps what comes. Its own retries and dead letters hold
                then, so `within`, `retry`, `max_deliveries` and `deliver` are refused.
            deliver: Called with what was read, instead of `bridge.dispatch(received)`: for an
                inbox of your own. What it raises is an outage: the message comes again, however
                often, and is never a dead letter.

        Raises:
            BridgeError: Something is wired so that messages would be lost, run twice at once, or
                go round.
            ValueError: A number or an option is not possible.
        """
        group = group_of(subscriber)
        check_types(event_types)
        if others not in ("dead", "ignore"):
            raise ValueError(f'others is "dead" or "ignore", not {others!r}')
        check_options(
            deliver, durable=durable, within=within, retry=retry, max_deliveries=max_deliveries
        )
        dead_engine = check_dead_letter(dead_letter, group)
        state = state_of(self._bus)
        delivering: Deliver
        if deliver is not None:
            delivering = ToKeeper(state, group.name, deliver, group.seconds_in_place)
        elif durable:
            keep = _inbox(state, group.name)
            delivering = ToKeeper(state, group.name, keep, group.seconds_in_place, _UNKEEPABLE)
        else:
            within = _WITHIN if within is None else within
            group.check_within(within)
            retry = retry or AsyncRetryingCaller(attempts=_ATTEMPTS)
            most = _DELIVERIES if max_deliveries is None else max_deliveries
            delivering = ToHandlers(state, group.name, group.engine, within, retry, most)
        note_consumed(self._bus, event_types)
        if durable:
            state.need_keeper(group.name)
        ignores = others == "ignore"
        consumer = Consumer(
            state, event_types, group.name, dead_letter, dead_engine, delivering, ignores=ignores
        )
        _attach(consumer, group, event_types)

    async def dispatch(self, received: Received) -> None:
        """Run the handlers of what was read from a message, as `consume` does: for `deliver=`.

        As `EventBus.dispatch`, and `current_delivery()` has the message's id and headers.

        Raises:
            DispatchError: Handlers failed; the group has every failure.
        """
        incoming = Incoming(received.event_id, received.headers)
        failures = await dispatch(state_of(self._bus), received.event, incoming)
        try:
            if failures:
                raise together(failures)
        finally:
            failures.clear()  # or this frame and the tracebacks keep each other alive


def _inbox(state: BusState, name: str) -> Callable[[Received], Awaitable[object]]:
    """What has the outbox of the bus keep events; it may be made later than the consumer."""

    async def keep(received: Received) -> None:
        if state.keeper is None:
            raise BridgeError(
                "consume(..., durable=True) needs an outbox: Outbox(bus, engine), where the "
                "application is wired"
            )
        await state.keeper.outbox.receive(
            received.event,
            consumer=name,
            message_id=received.unique_id,
            headers=received.headers,
            event_id=received.event_id,
        )

    return keep


def _attach(consumer: Consumer, group: Group, event_types: Sequence[type]) -> None:
    """Have FastStream call the consumer for each message of these subscribers."""
    whole_message = _whole_message(event_types)
    for number, subscriber in enumerate(group.subscribers):
        # AsyncAPI tells the subscribers of one place apart by the names of their functions.
        name = "consume" if not number else f"consume_{number + 1}"
        _attach_one(subscriber, consumer, group, whole_message, name)


def _attach_one(
    subscriber: Any, consumer: Consumer, group: Group, whole_message: type, name: str
) -> None:
    async def consume(event: Any) -> None:
        await consumer.receive(event, subscriber)

    consume.__name__ = name
    consume.__annotations__["event"] = whole_message
    if group.engine.parse is not None:
        # Not `subscriber(parser=)`, which would take the place of a parser of the user's own.
        subscriber._parser = partial(group.engine.parse, parse=subscriber._parser)  # noqa: SLF001
    # What fails before the consumer is called, in a middleware, would be dropped by some policies.
    subscriber.ack_policy = AckPolicy.NACK_ON_ERROR
    subscriber(consume, decoder=_whole)


def _whole_message(event_types: Sequence[type]) -> type:
    """Make a type whose schema in AsyncAPI is that of the events, and of which everything is.

    FastStream has pydantic or msgspec convert what a handler takes, and loses what cannot be.
    """
    either: Any = Union[tuple(map(_described, event_types))]  # noqa: UP007 - `|` takes no tuple

    class Message(metaclass=_Everything):
        @classmethod
        def __get_pydantic_core_schema__(cls, _: object, build: GetCoreSchemaHandler) -> CoreSchema:
            return core_schema.no_info_wrap_validator_function(_as_it_is, build(either))

    return Message


def _described(event_type: type) -> Any:
    """Give what pydantic can describe: of msgspec and attrs it knows nothing."""
    if language_of(event_type) == "pydantic":
        return event_type
    schema = {"title": event_type.__name__, "type": "object"}
    return Annotated[Any, WithJsonSchema(schema)]


class _Everything(type):
    """The type of types of which everything is an instance: msgspec asks for that."""

    def __instancecheck__(cls, instance: object) -> bool:
        return True


def _as_it_is(message: object, _: object) -> object:
    return message


async def _whole(message: object) -> object:
    """Decode nothing: a body that cannot be decoded would never come to the consumer."""
    return message
