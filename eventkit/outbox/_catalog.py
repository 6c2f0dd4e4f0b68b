"""Owns which stored deliveries this process can run: names of handlers, and names of event types.

Knows nothing of tables. Names lead to what is subscribed here; nothing is imported for them.
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
    """What it takes to run a stored delivery.

    Attributes:
        codec: How to decode its event.
        subscription: Its handler.
        plan: A plan of this handler alone.
    """

    codec: Codec[Any]
    subscription: Subscription
    plan: Plan


class Catalog:
    """The durable handlers of a bus, and the types of their events, by all their names.

    Thread-safe: it asks the bus each time, so what is subscribed later is known at once.
    """

    def __init__(self, bus: EventBus) -> None:
        self._registry = registry_of(bus)
        self._warned = False

    def admit(self, declaration: Declaration) -> None:
        """Refuse a durable handler of events that cannot be stored.

        A base class is not instantiated itself as a rule: its subclasses are looked at as they are
        subscribed, or published.

        Raises:
            InvalidEventTypeError: Naming the field, and what to do.
        """
        if declaration.declared.durable is not None:
            codec_for(declaration.event_type)
            self._warn_of_main(declaration)

    def _warn_of_main(self, declaration: Declaration) -> None:
        """Warn once of names that hold in one script alone, however it is started."""
        stored = [declaration.declared.name, wire_name(declaration.event_type)]
        of_a_script = [name for name in stored if name.startswith("__main__:")]
        if of_a_script and not self._warned:
            self._warned = True
            log(
                logging.WARNING,
                "what is stored under these names is found by no process that imports the script: "
                "name the event, @named(...), and the handler, name=, or move them to a module",
                names=", ".join(of_a_script),
            )

    def admit_all(self) -> None:
        """Do so for all that are subscribed already."""
        for subscription in self._durable():
            self.admit(subscription)

    def known(self) -> Known:
        """All names of handlers and of event types that can be run here."""
        handlers: dict[str, None] = {}
        types: dict[str, None] = {}
        for subscription in self._durable():
            handlers.update(dict.fromkeys(_names_of_handler(subscription)))
            for event_type in _with_subclasses(subscription.event_type):
                types.update(dict.fromkeys(names_of(event_type)))
        return Known(tuple(handlers), tuple(types))

    def handler(self, name: str, event_type: type) -> Subscription | None:
        """Who is called so, or was before, and takes events of this type; None if nobody does."""
        found = (
            subscription
            for subscription in self._durable()
            if name in _names_of_handler(subscription)
            and issubclass(event_type, subscription.event_type)
        )
        return next(found, None)

    def codec(self, name: str) -> Codec[Any] | None:
        """How to decode what is stored under this name; None where nobody takes such events."""
        for subscription in self._durable():
            for event_type in _with_subclasses(subscription.event_type):
                if name in names_of(event_type):
                    return codec_for(event_type)
        return None

    def find(self, handler: str, event_type: str) -> Found | None:
        """What it takes to run what is stored under these names; None where nobody can."""
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
