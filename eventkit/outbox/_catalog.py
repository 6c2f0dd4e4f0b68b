"""Owns which stored deliveries this process can run: names of handlers, and names of event types.

Knows nothing of tables. Finds handlers only among the subscriptions of the bus, and imports no
module to find one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

from eventkit._core.bus import EventBus, registry_of
from eventkit._core.log import log
from eventkit._core.subscriptions import Declaration, Plan, Subscription
from eventkit.outbox._store import Known
from eventkit.wire import Codec, codec_for, names_of, wire_name


class Found(NamedTuple):
    """The codec, the handler and the plan for a stored delivery.

    Attributes:
        codec: Decodes the event.
        subscription: The subscription of the handler.
        plan: A plan of this handler alone.
    """

    codec: Codec[Any]
    subscription: Subscription
    plan: Plan


class Catalog:
    """The durable handlers of a bus and the types of their events, by current and former names.

    Thread-safe. Each call reads the subscriptions of the bus, so later subscriptions are found.
    """

    def __init__(self, bus: EventBus) -> None:
        self._registry = registry_of(bus)
        self._warned = False

    def admit(self, declaration: Declaration) -> None:
        """Refuse a durable handler of events that cannot be stored.

        Only the class itself is checked. A subclass is checked when a handler subscribes to it, or
        when an event of it is published.

        Raises:
            InvalidEventTypeError: The error names the field and the remedy.
        """
        if declaration.declared.durable is not None:
            codec_for(declaration.event_type)
            self._warn_of_main(declaration)

    def _warn_of_main(self, declaration: Declaration) -> None:
        """Warn once of names that begin with `__main__`: they are valid in one script only."""
        stored = [declaration.declared.name, wire_name(declaration.event_type)]
        of_a_script = [name for name in stored if name.startswith("__main__:")]
        if of_a_script and not self._warned:
            self._warned = True
            log(
                logging.WARNING,
                "these names are valid only in a script that is run directly: a process that "
                "imports it cannot run deliveries stored under them. Use @named(...) for the event "
                "and name= for the handler, or move both to a module",
                names=", ".join(of_a_script),
            )

    def admit_all(self) -> None:
        """Call `admit` for all current subscriptions."""
        for subscription in self._durable():
            self.admit(subscription)

    def known(self) -> Known:
        """Return all names of handlers and event types that this process can run."""
        handlers: dict[str, None] = {}
        types: dict[str, None] = {}
        for subscription in self._durable():
            handlers.update(dict.fromkeys(_names_of_handler(subscription)))
            for event_type in _with_subclasses(subscription.event_type):
                types.update(dict.fromkeys(names_of(event_type)))
        return Known(tuple(handlers), tuple(types))

    def handler(self, name: str, event_type: type) -> Subscription | None:
        """Return the handler with this current or former name, for this type of event; or None."""
        found = (
            subscription
            for subscription in self._durable()
            if name in _names_of_handler(subscription)
            and issubclass(event_type, subscription.event_type)
        )
        return next(found, None)

    def codec(self, name: str) -> Codec[Any] | None:
        """Return the codec for this stored name; None if no durable handler takes such events."""
        for subscription in self._durable():
            for event_type in _with_subclasses(subscription.event_type):
                if name in names_of(event_type):
                    return codec_for(event_type)
        return None

    def find(self, handler: str, event_type: str) -> Found | None:
        """Return the codec, the handler and its plan for these stored names; None if unknown."""
        codec = self.codec(event_type)
        subscription = None if codec is None else self.handler(handler, codec.event_type)
        if codec is None or subscription is None:
            return None
        return Found(codec, subscription, Plan.of([(subscription,)]))

    def _durable(self) -> Iterator[Subscription]:
        return (each for each in self._registry if each.declared.durable is not None)


def _names_of_handler(subscription: Subscription) -> tuple[str, ...]:
    durable = subscription.declared.durable
    former = () if durable is None else durable.formerly
    return (subscription.declared.name, *former)


def _with_subclasses(event_type: type) -> Iterator[type]:
    yield event_type
    subclasses: list[type] = event_type.__subclasses__()
    for subclass in subclasses:
        yield from _with_subclasses(subclass)
