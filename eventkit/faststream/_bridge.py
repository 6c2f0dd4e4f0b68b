"""Owns the bridge between a bus and brokers, as users wire it.

Knows nothing of a single message.
"""

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
from eventkit._core.durable import Durable, as_durable
from eventkit._core.state import BusState
from eventkit._core.subscriptions import Subscription
from eventkit._core.turns import together
from eventkit.exceptions import BridgeError
from eventkit.faststream._consumer import Consumer, Deliver
from eventkit.faststream._deliver import ToHandlers, ToKeeper, run_handlers
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
_UNKEEPABLE = (ValueError, TypeError)  # what an outbox raises if no table can hold the event


class Bridge:
    """Sends events of a bus to brokers, and delivers events of other services to its handlers.

        bridge = Bridge(bus, source="/orders")
        bridge.forward(OrderPlaced, broker.publisher("orders.placed", stream=orders))
        bridge.consume(
            broker.subscriber("bills.paid", stream=bills, durable="orders", pull_sub=True),
            BillPaid,
            dead_letter=broker.publisher("dead.orders", stream=dead),
        )

    Publishers and subscribers are those of FastStream, with all of their options: for NATS
    JetStream, RabbitMQ, Redis streams, and Kafka with aiokafka. The application starts and stops
    the broker in its lifespan. A bridge works on asyncio only, because FastStream does.

    Wire the bridge at import, where handlers are subscribed. Wiring that would lose messages is
    refused then, and not at the first message. A bridge holds nothing of an event loop. Its methods
    are not thread-safe: wire in one thread.

    Args:
        bus: The bus of the events to send, and of the handlers for received events.
        source: The name of this service in its messages, a URI reference such as "/orders".

    Raises:
        TypeError: `bus` is no EventBus.
        ValueError: `source` is no `str`, or empty.
    """

    def __init__(self, bus: EventBus, *, source: str) -> None:
        if not isinstance(bus, EventBus):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Bridge() takes an EventBus first, not {bus!r}")
        if not source or not isinstance(source, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f'source is the name of this service, as "/orders", not {source!r}')
        self._bus = bus
        self._source = source

    def __repr__(self) -> str:
        return f"<Bridge of {self._bus!r} as {self._source!r}>"

    def forward(
        self,
        event_type: type[E],
        publisher: Any,  # Any: FastStream has a publisher class for each broker
        *,
        key: Callable[[E], str | None] | None = None,
        name: str | None = None,
        timeout: float = 10.0,
        durable: bool | Durable = False,
    ) -> Subscription:
        """Send the events of a class to a broker.

            bridge.forward(OrderPlaced, broker.publisher("orders.placed", stream=orders))

        A forward is a handler. Its failure is isolated, logged, counted and explained as for other
        handlers. It succeeds when the broker has confirmed the message.

        An event is sent at most once. With `durable=` it is sent at least once: the outbox tries
        again until the broker has confirmed it, also after a crash. Events of up to `concurrency`
        requests are sent at the same time, so the order of requests is not kept. `key` and
        `durable=` together keep the order for each key.

        Args:
            event_type: A class with a name from `named`. An event of a subclass fails: forward the
                subclass under its own name.
            publisher: A publisher of FastStream. Its broker has to be started before the first
                event.
            key: A function of the event. It returns the same `str` for events that belong together.
                The result is the key of the Kafka record. With `durable=` it is also the key of
                `Durable`: events with an equal key are sent one at a time, in the order of their
                commits.
            name: The name of the handler in logs and stored rows. By default `forward:` and the
                name of the event.
            timeout: Seconds. The broker has to confirm within this time.
            durable: As for `EventBus.subscribe`.

        Returns:
            The subscription; `cancel()` ends it.

        Raises:
            BridgeError: The class has no name, cannot be written as JSON, or is consumed on this
                bus. Or the broker of the publisher does not confirm messages.
            TypeError: `key` is no function.
            ValueError: `key` is given here and in `Durable`.
        """
        check_type(event_type)
        engine = check_publisher(publisher)
        if key is not None and not callable(key):
            raise TypeError(f"key has to be a function that takes the event, not {key!r}")
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
        subscriber: Any,  # Any: as `forward`'s publisher
        *event_types: type,
        dead_letter: Any,  # Any: as `forward`'s publisher
        others: Literal["dead", "ignore"] = "dead",
        within: float | None = None,
        retry: AsyncRetryingCaller | None = None,
        max_deliveries: int | None = None,
        durable: bool = False,
        deliver: Callable[[Received], Awaitable[object]] | None = None,
    ) -> None:
        """Run handlers for received messages, and acknowledge each message afterwards.

            bridge.consume(subscriber, OrderPlaced, dead_letter=broker.publisher("dead.billing"))

        Handlers run at least once. All handlers run again if one fails, and after a crash. After
        five attempts, or `within` seconds, the message becomes a dead letter. A handler may raise
        two exceptions of FastStream: `RejectMessage` makes the message a dead letter at once, and
        `NackMessage` hands the message back to the broker, so that it comes again. In a handler,
        `current_delivery().event_id` is the id of the message, and `.received` has its headers.

        With `durable=True` the outbox of the bus stores the event, and the message is acknowledged
        after that commit. A message that comes again is dropped. Each durable handler is retried
        alone, as its `Durable` says. Other handlers run at most once.

        The subscriber and its broker decide how many messages are handled at the same time. The
        broker decides the order. A message that was handed back comes later. If the handling of a
        message is cancelled, because the process stops, the message is handed back.

        Args:
            subscriber: A subscriber without a handler. Or a list of subscribers that belong
                together: for Redis one that reads, and one with `min_idle_time` that takes over
                from dead processes.
            event_types: All classes of events that may come, each with a name from `named`.
            dead_letter: A publisher for messages that cannot be handled. A dead letter is the
                unchanged message with four more headers: `eventkit-reason`, `eventkit-error`,
                `eventkit-consumer` and `eventkit-round`.
            others: For messages of other types. "dead" makes them dead letters. "ignore"
                acknowledges and forgets them.
            within: Seconds for all attempts together, 25 by default. It has to be less than the
                time after which the broker gives the message to another process.
            retry: The number of attempts after the first one, and their pauses. The first retry
                follows at once. By default four, with the pauses of stamina.
            max_deliveries: How often the broker may give out a message, 10 by default. Then the
                message is a dead letter. Crashes and `NackMessage` count, too. Kafka and the
                classic queues of RabbitMQ do not count.
            durable: Whether the outbox stores the event. The outbox has its own retries and dead
                letters, so `within`, `retry`, `max_deliveries` and `deliver` are refused then.
            deliver: A function for an inbox of your own. It is called with the received event
                instead of `bridge.dispatch(received)`. If it raises `RejectMessage`, the message is
                a dead letter. After any other exception the message comes again, any number of
                times.

        Raises:
            BridgeError: With this wiring, messages would be lost, handled twice at the same time,
                or sent in a circle.
            ValueError: `others`, `within` or `max_deliveries` has an impossible value.
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
            keep = _inbox(state, group)
            delivering = ToKeeper(state, group.name, keep, group.seconds_in_place, _UNKEEPABLE)
        else:
            within = _WITHIN if within is None else within
            group.check_within(within)
            retry = retry or AsyncRetryingCaller(attempts=_ATTEMPTS)
            max_deliveries = _DELIVERIES if max_deliveries is None else max_deliveries
            delivering = ToHandlers(state, group.name, group.engine, within, retry, max_deliveries)
        note_consumed(self._bus, event_types)
        if durable:
            state.need_keeper(group.name)
        ignores = others == "ignore"
        consumer = Consumer(
            state, event_types, group.name, dead_letter, dead_engine, delivering, ignores=ignores
        )
        _attach(consumer, group, event_types)

    async def dispatch(self, received: Received) -> None:
        """Run the handlers of a received event now. For functions that are given to `deliver=`.

        It does the same as `EventBus.dispatch`. In handlers, `current_delivery()` has the id and
        the headers of the message.

        Raises:
            DispatchError: Handlers failed. The exception group has every failure.
        """
        failures = await run_handlers(state_of(self._bus), received)
        try:
            if failures:
                raise together(failures)
        finally:
            failures.clear()  # or this frame and the tracebacks keep each other alive


def _inbox(state: BusState, group: Group) -> Callable[[Received], Awaitable[object]]:
    """Make the function that stores events in the outbox. The outbox may be made later."""

    async def keep(received: Received) -> None:
        if state.keeper is None:
            raise BridgeError(
                "consume(..., durable=True) needs an outbox: Outbox(bus, engine), where the "
                "application is wired"
            )
        await state.keeper.outbox.receive(
            received.event,
            # Not `group.name`: a broker may have included the router since, with a prefix.
            consumer=group.engine.consumer(group.subscribers[0]),
            message_id=received.unique_id,
            headers=received.headers,
            event_id=received.event_id,
        )

    return keep


def _attach(consumer: Consumer, group: Group, event_types: Sequence[type]) -> None:
    """Let FastStream call the consumer for each message of these subscribers."""
    whole_message = _whole_message(event_types)
    for number, subscriber in enumerate(group.subscribers):
        # AsyncAPI distinguishes the subscribers of one place by the names of their functions.
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
        # Not `subscriber(parser=)`: it would replace a parser of the user.
        subscriber._parser = partial(group.engine.parse, parse=subscriber._parser)  # noqa: SLF001
    # Other policies drop a message if a middleware fails before the consumer is called.
    subscriber.ack_policy = AckPolicy.NACK_ON_ERROR
    subscriber(consume, decoder=_whole)


def _whole_message(event_types: Sequence[type]) -> type:
    """Make a type with the events' schema in AsyncAPI; every object is an instance of it.

    FastStream converts a handler's argument by pydantic or msgspec, and loses a message that cannot
    be converted.
    """
    either: Any = Union[tuple(map(_described, event_types))]  # noqa: UP007 - `|` takes no tuple

    class Message(metaclass=_Everything):
        @classmethod
        def __get_pydantic_core_schema__(cls, _: object, build: GetCoreSchemaHandler) -> CoreSchema:
            return core_schema.no_info_wrap_validator_function(_as_it_is, build(either))

    return Message


def _described(event_type: type) -> Any:
    """Return a type that pydantic can describe: pydantic does not know msgspec and attrs."""
    if language_of(event_type) == "pydantic":
        return event_type
    schema = {"title": event_type.__name__, "type": "object"}
    return Annotated[Any, WithJsonSchema(schema)]


class _Everything(type):
    """A metaclass that accepts every object as an instance. msgspec asks for one."""

    def __instancecheck__(cls, instance: object) -> bool:
        return True


def _as_it_is(message: object, _: object) -> object:
    return message


async def _whole(message: object) -> object:
    """Decode nothing: FastStream drops a body that it cannot decode."""
    return message
