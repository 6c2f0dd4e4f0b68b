"""Owns the checks of a bridge's wiring. They refuse wiring that loses messages or makes a circle.

Knows nothing of the handling of a message.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

from eventkit._core.bus import EventBus
from eventkit._core.log import log
from eventkit.exceptions import BridgeError, InvalidEventTypeError
from eventkit.faststream._engines import Engine, engine_of, problem_of_codec, problem_of_policy
from eventkit.wire import codec_for, is_named, names_of

_LONGEST_IN_PLACE = 25.0  # seconds to retry an inbox that is away, before the hand-back

# The consumed and the forwarded types of each bus.
_consumed: WeakKeyDictionary[EventBus, set[type]] = WeakKeyDictionary()
_forwarded: WeakKeyDictionary[EventBus, set[type]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Group:
    """The subscribers of one consumer.

    Attributes:
        subscribers: Subscribers of FastStream. Any: each broker has its own class.
        engine: The engine of their broker.
        name: The name of the consumer.
        patience: Seconds until the broker gives a message to another process. None: never, while
            the connection lasts.
    """

    subscribers: Sequence[Any]
    engine: Engine
    name: str
    patience: float | None

    @property
    def seconds_in_place(self) -> float:
        """How long a message may wait here for an inbox: at most half of the broker's patience."""
        patience = self.patience
        return _LONGEST_IN_PLACE if patience is None else min(_LONGEST_IN_PLACE, patience / 2)

    def check_within(self, within: float) -> None:
        """Refuse a time limit that is not below the broker's patience.

        Raises:
            BridgeError: The limit is too long.
            ValueError: The limit is not above 0.
        """
        if not within > 0:
            raise ValueError(f"within has to be above 0 seconds, not {within!r}")
        if self.patience is not None and within >= self.patience:
            raise BridgeError(
                f"the broker hands a message out again after {self.patience:g} s, so it would be "
                f"handled twice: within={within:g} has to be below that{self.engine.how_to_wait}"
            )


def group_of(subscriber: Any) -> Group:
    """Make a group of a subscriber or of a list of subscribers.

    Raises:
        BridgeError: A subscriber would lose messages, or cannot be used.
    """
    is_list = isinstance(subscriber, list | tuple)
    subscribers = [*cast("Sequence[Any]", subscriber)] if is_list else [subscriber]
    if not subscribers:
        raise BridgeError("consume() needs a subscriber, and the list is empty")
    engine = _engine_for(subscribers[0], "subscriber")
    for each in subscribers:
        if _engine_for(each, "subscriber") is not engine:
            raise BridgeError(
                "the subscribers of one consumer belong to one broker: call consume() for each"
            )
        if each.calls:
            raise BridgeError(
                "this subscriber has a handler already: pass another one to consume(), with all of "
                "its event types in one call"
            )
        _refuse(engine.problem_of_subscriber(each) or problem_of_policy(each))
    _refuse(engine.problem_of_subscribers(subscribers))
    waits = [engine.patience(each) for each in subscribers]
    patience = min((seconds for seconds in waits if seconds is not None), default=None)
    name = engine.consumer(subscribers[0])
    for each in subscribers:
        if (doubt := engine.doubt_of_subscriber(each)) is not None:
            log(logging.WARNING, doubt, consumer=name)
    return Group(subscribers, engine, name, patience)


def check_publisher(publisher: Any) -> Engine:
    """Check that the broker of a publisher confirms messages, and return its engine.

    Raises:
        BridgeError: The broker does not confirm them.
    """
    engine = _engine_for(publisher, "publisher")
    _refuse(engine.problem_of_publisher(publisher))
    return engine


def check_dead_letter(publisher: Any, group: Group) -> Engine:
    """Check the publisher of dead letters, and return its engine.

    Raises:
        BridgeError: A subscriber of the group would read the dead letters, or the broker confirms
            nothing.
    """
    engine = check_publisher(publisher)
    if engine is group.engine and any(
        engine.comes_to(publisher, each) for each in group.subscribers
    ):
        raise BridgeError(
            f"dead letters of {group.name!r} would come back to the same consumer, in an endless "
            "circle: publish them to another place"
        )
    return engine


def check_type(event_type: type) -> None:
    """Refuse a class if another service could not recognise or read its events.

    Raises:
        BridgeError: The argument is no class, or the class has no name or cannot be written as
            JSON.
    """
    if not isinstance(event_type, type):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise BridgeError(f"forward() and consume() take classes of events, not {event_type!r}")
    kind = event_type.__qualname__
    if not is_named(event_type):
        raise BridgeError(
            f'{kind} has no name for the wire: decorate it with @named("shop.order.placed.v1")'
        )
    try:
        codec_for(event_type)
    except InvalidEventTypeError as error:
        raise BridgeError(f"{kind} cannot be written as JSON: {error}") from error


def check_types(event_types: Sequence[type]) -> None:
    """Refuse classes that share a name: the type of a message would not identify one class.

    Raises:
        BridgeError: There is no class, two classes share a name, or a class cannot be used.
    """
    if not event_types:
        raise BridgeError("consume() takes at least one class of events, after the subscriber")
    known: dict[str, type] = {}
    for event_type in event_types:
        check_type(event_type)
        for name in names_of(event_type):
            if known.setdefault(name, event_type) is not event_type:
                raise BridgeError(
                    f"{known[name].__qualname__} and {event_type.__qualname__} are both called "
                    f"{name!r}, so a message could be either: rename one of them"
                )


def check_options(deliver: object, *, durable: bool, **given: object) -> None:
    """Refuse options for retries if the outbox retries, or if `deliver` is given.

    Raises:
        BridgeError: Such an option is given.
        ValueError: `max_deliveries` is below 1.
    """
    named = [name for name, value in given.items() if value is not None]
    if durable and deliver is not None:
        named.append("deliver")
    if named and durable:
        raise BridgeError(
            f"{', '.join(named)} and durable=True exclude each other: with durable=True the outbox "
            "retries, as Durable(...) of each handler says"
        )
    if named and deliver is not None:
        raise BridgeError(
            f"{', '.join(named)} and deliver= exclude each other: if deliver= raises, the message "
            "comes again, any number of times. Limit attempts and time inside of the function; to "
            "make a dead letter, raise RejectMessage there"
        )
    most = given["max_deliveries"]
    if isinstance(most, int) and most < 1:
        raise ValueError(f"max_deliveries is at least 1, not {most!r}")


def note_consumed(bus: EventBus, event_types: Sequence[type]) -> None:
    """Note that these classes are consumed on this bus.

    Raises:
        BridgeError: One of the classes is forwarded from this bus.
    """
    for each in event_types:
        for other in _forwarded.get(bus, ()):
            _refuse_both(each, other)
    _consumed.setdefault(bus, set()).update(event_types)


def note_forwarded(bus: EventBus, event_type: type) -> None:
    """Note that this class is forwarded from this bus.

    Raises:
        BridgeError: The class is consumed on this bus.
    """
    for each in _consumed.get(bus, ()):
        _refuse_both(each, event_type)
    _forwarded.setdefault(bus, set()).add(event_type)


def _refuse_both(consumed: type, forwarded: type) -> None:
    if issubclass(consumed, forwarded):
        raise BridgeError(
            f"{consumed.__qualname__} is consumed and forwarded on one bus, so its messages would "
            "go in a circle: forward an event of another class"
        )


def _engine_for(endpoint: object, kind: Literal["publisher", "subscriber"]) -> Engine:
    engine = engine_of(endpoint, kind)
    if engine is None:
        raise BridgeError(
            f"a {kind} of FastStream's NATS, Kafka, RabbitMQ or Redis broker is needed, not "
            f"{endpoint!r}"
        )
    _refuse(problem_of_codec(endpoint))
    return engine


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise BridgeError(problem)
