"""Owns the bridge between a bus and brokers: what users wire, and what is refused there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar, Union, cast
from weakref import WeakKeyDictionary

from pydantic import WrapValidator
from stamina import AsyncRetryingCaller

from eventkit._core.bus import EventBus, state_of
from eventkit._core.durable import Durable, as_durable
from eventkit._core.state import BusState
from eventkit._core.subscriptions import Subscription
from eventkit.exceptions import BridgeError, InvalidEventTypeError
from eventkit.faststream._consumer import Consumer, Deliver
from eventkit.faststream._deliver import ToHandlers, ToKeeper
from eventkit.faststream._engines import Engine, engine_of, problem_of_policy, repaired
from eventkit.faststream._forward import Forward
from eventkit.wire import Received, codec_for, names_of, wire_name
from eventkit.wire._names import is_named

E = TypeVar("E")

_WITHIN = 25.0  # seconds
_DELIVERIES = 10
_LONGEST_PATIENCE = 25.0  # seconds that an inbox may be away before a message is handed back

# By bus: the types that are consumed, and those that are forwarded.
_wired: WeakKeyDictionary[EventBus, tuple[set[type], set[type]]] = WeakKeyDictionary()


class Bridge:
    """Sends events of a bus to brokers, and gives it events of other services.

        bridge = Bridge(bus, source="/orders")
        bridge.forward(OrderPlaced, broker.publisher("orders.placed", stream=orders))
        bridge.consume(
            broker.subscriber("bills.paid", stream=bills, durable="orders", queue="orders"),
            BillPaid,
            dead_letter=broker.publisher("dead.orders", stream=dead),
        )

    Publishers and subscribers are FastStream's own, with all of its options; the application starts
    and stops the broker. NATS JetStream, RabbitMQ, Kafka (aiokafka) and streams of Redis. On
    asyncio alone. Holds nothing that is bound to an event loop. What is wired wrongly is refused
    here, and not by the first message.

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

        An ordinary handler: it fails alone, is counted and explained as others are, and has
        succeeded when the broker has confirmed the message. Without an outbox an event is sent at
        most once; with `durable=` until the broker has it, after a crash, too.

        Args:
            event_type: Named with `named`. Events of subclasses fail: they have names of their own.
            publisher: Of a started broker, by the time of the first event.
            key: Called with the event; says what belongs together. Kafka keeps the order per key.
                With `durable=` it is the key of `Durable`, too: one at a time, in the order of
                their commits.
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
        self._check_type(event_type)
        engine = _engine_of(publisher, "publisher")
        _refuse(engine.problem_of_publisher(publisher))
        self._note({event_type}, forwarded=True)
        if key is not None and not callable(key):
            raise TypeError(f"key takes a function from the event to a text, not {key!r}")
        options = as_durable(durable)
        if options is not None and key is not None:
            if options.key is not None:
                raise ValueError("key is given twice: to forward(), and to Durable()")
            options = replace(options, key=key)
        forward = Forward(event_type, publisher, engine, self._source, key)
        return self._bus.subscribe(
            event_type,
            forward.__call__,
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

        At least once: all handlers of an event run again where one has failed, and after a crash.
        `current_delivery().event_id` is the message's id, and `.received` has its headers.
        A handler that raises FastStream's `RejectMessage` has the message become a dead letter at
        once; `NackMessage` hands it back, to come again.

        With `durable=True` the bus's outbox keeps it: what was received before is dropped, each
        durable handler is tried again alone, and the message is acknowledged after that commit.

        Args:
            subscriber: Or a list of them that belong together, as those of Redis do.
            event_types: What is consumed, each named with `named`.
            dead_letter: A publisher for what cannot be handled. It has the message as it came, and
                the headers `eventkit-reason`, `eventkit-error` and `eventkit-consumer`.
            others: Whether messages of other types become dead letters, or are acknowledged and
                forgotten.
            within: Seconds for all attempts together, 25 by default. Less than the broker waits
                before it gives the message to another process.
            retry: How often and when handlers run again, after the second attempt, which follows
                the first at once. By default five attempts in all, with stamina's pauses.
            max_deliveries: How often the broker may give out a message before it is dead, 10 by
                default. Kafka does not count.
            durable: Whether the outbox keeps what comes. Its own retries and dead letters hold
                then, so `within`, `retry`, `max_deliveries` and `deliver` are refused.
            deliver: Called with what was read, instead of `bus.dispatch(received.event)`: for an
                inbox of your own. What it raises is an outage: the message comes again, however
                often, and is never a dead letter.

        Raises:
            BridgeError: Something is wired so that messages would be lost, run twice at once, or
                go round.
            ValueError: A number or an option is not possible.
        """
        subscribers = [*cast("Sequence[Any]", subscriber)] if _is_list(subscriber) else [subscriber]
        if not subscribers or not event_types:
            raise BridgeError("consume() takes a subscriber, and at least one class of events")
        engine = _engine_of(subscribers[0], "subscriber")
        for each in event_types:
            self._check_type(each)
        self._check_names(event_types)
        for each in subscribers:
            _check_subscriber(each, engine)
        _refuse(engine.problem_of_subscribers(subscribers))
        if others not in ("dead", "ignore"):
            raise ValueError(f'others is "dead" or "ignore", not {others!r}')
        _check_options(
            deliver, durable=durable, within=within, retry=retry, max_deliveries=max_deliveries
        )
        if within is not None and not within > 0:
            raise ValueError(f"within takes seconds above 0, not {within!r}")
        if max_deliveries is not None and max_deliveries < 1:
            raise ValueError(f"max_deliveries is at least 1, not {max_deliveries!r}")
        patience = _patience(engine, subscribers)
        if not durable and deliver is None:
            _check_within(_WITHIN if within is None else within, patience, engine)
        dead_engine = _engine_of(dead_letter, "publisher")
        _refuse(dead_engine.problem_of_publisher(dead_letter))
        _refuse_circle(dead_letter, dead_engine, subscribers, engine)
        self._note(set(event_types), forwarded=False)

        state, name = state_of(self._bus), engine.consumer(subscribers[0])
        delivering: Deliver
        if durable:
            state.need_keeper(name)
            keep = _inbox(state, name)
            delivering = ToKeeper(state, name, keep, _in_place(patience))
        elif deliver is not None:
            delivering = ToKeeper(state, name, deliver, _in_place(patience))
        else:
            delivering = ToHandlers(
                state,
                name,
                engine,
                _WITHIN if within is None else within,
                AsyncRetryingCaller(attempts=4) if retry is None else retry,
                _DELIVERIES if max_deliveries is None else max_deliveries,
            )
        consumer = Consumer(
            state,
            event_types,
            name,
            dead_letter,
            dead_engine,
            delivering,
            ignores=others == "ignore",
        )
        for each in subscribers:
            _attach(each, consumer, event_types, engine)

    def _check_type(self, event_type: type) -> None:
        if not isinstance(event_type, type):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BridgeError(f"{event_type!r} is no class of events")
        kind = event_type.__qualname__
        if not is_named(event_type):
            raise BridgeError(
                f'{kind} has no name for the wire: decorate it with @named("shop.order.placed.v1")'
            )
        try:
            codec_for(event_type)
        except InvalidEventTypeError as error:
            raise BridgeError(f"{kind} cannot be written as JSON: {error}") from error

    def _check_names(self, event_types: Sequence[type]) -> None:
        known: dict[str, type] = {}
        for event_type in event_types:
            for name in names_of(event_type):
                if known.setdefault(name, event_type) is not event_type:
                    raise BridgeError(
                        f"{known[name].__qualname__} and {event_type.__qualname__} are both called "
                        f"{name!r}: a message could be either"
                    )

    def _note(self, event_types: set[type], *, forwarded: bool) -> None:
        """Refuse what would go round in a circle, and know these from now on."""
        both = _wired.setdefault(self._bus, (set(), set()))
        mine, others = both[forwarded], both[not forwarded]
        for each in event_types:
            for other in others:
                consumed, sent = (other, each) if forwarded else (each, other)
                if issubclass(consumed, sent):
                    raise BridgeError(
                        f"{consumed.__qualname__} is consumed and forwarded on one bus, and would "
                        "go round in a circle: give what is sent on a type of its own"
                    )
        mine |= event_types


def _is_list(subscriber: object) -> bool:
    return isinstance(subscriber, list | tuple)


def _engine_of(endpoint: object, kind: Literal["publisher", "subscriber"]) -> Engine:
    engine = engine_of(endpoint, kind)
    if engine is None:
        raise BridgeError(
            f"a {kind} of FastStream's NATS, Kafka, RabbitMQ or Redis broker is needed, not "
            f"{endpoint!r}"
        )
    return engine


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise BridgeError(problem)


def _check_subscriber(subscriber: Any, engine: Engine) -> None:
    if engine_of(subscriber, "subscriber") is not engine:
        raise BridgeError("the subscribers of one consumer belong to one broker")
    if subscriber.calls:
        raise BridgeError(
            "this subscriber has a handler already: give consume() one of its own, and all of its "
            "event types at once"
        )
    _refuse(engine.problem_of_subscriber(subscriber) or problem_of_policy(subscriber))


def _check_options(deliver: object, *, durable: bool, **given: object) -> None:
    named = [name for name, value in given.items() if value is not None]
    if durable and deliver is not None:
        named.append("deliver")
    if named and durable:
        raise BridgeError(
            f"{', '.join(named)} and durable=True exclude each other: retries and dead letters are "
            "the outbox's then, by Durable(...) of each handler"
        )
    if named and deliver is not None:
        raise BridgeError(
            f"{', '.join(named)} and deliver= exclude each other: what deliver= raises is tried "
            "again, however often"
        )


def _check_within(within: float, patience: float | None, engine: Engine) -> None:
    if patience is not None and within >= patience:
        raise BridgeError(
            f"the broker hands a message out again after {patience:g} s, so it would be handled "
            f"twice: within={within:g} has to be below that{engine.how_to_wait}"
        )


def _patience(engine: Engine, subscribers: Sequence[Any]) -> float | None:
    return min(
        (seconds for each in subscribers if (seconds := engine.patience(each)) is not None),
        default=None,
    )


def _in_place(patience: float | None) -> float:
    """How long a message waits here for who keeps it: well below the broker's patience."""
    return _LONGEST_PATIENCE if patience is None else min(_LONGEST_PATIENCE, patience / 2)


def _refuse_circle(
    dead_letter: Any, dead_engine: Engine, subscribers: Sequence[Any], engine: Engine
) -> None:
    if dead_engine is not engine:
        return
    place = engine.place(dead_letter)
    if place is not None and place in [engine.place(each) for each in subscribers]:
        raise BridgeError(
            f"dead letters would go to {place!r}, where they are consumed, and go round for ever: "
            "give them a place of their own"
        )


def _inbox(state: BusState, name: str) -> Callable[[Received], Awaitable[object]]:
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


def _attach(
    subscriber: Any, consumer: Consumer, event_types: Sequence[type], engine: Engine
) -> None:
    """Have FastStream call the consumer."""

    async def consume(event: Any) -> None:
        await consumer.receive(event, subscriber)

    # The schema in AsyncAPI is that of the events; what comes is the whole message.
    either: Any = Union[tuple(event_types)]  # noqa: UP007 - `|` takes no tuple
    consume.__annotations__["event"] = Annotated[either, WrapValidator(_as_it_is)]
    subscriber(consume, decoder=_whole, parser=repaired if engine.name == "Kafka" else None)


def _as_it_is(message: object, _: object) -> object:
    return message


async def _whole(message: object) -> object:
    """Decode nothing: a body that cannot be decoded would never come to the consumer."""
    return message
