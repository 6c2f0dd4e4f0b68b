"""Owns the data classes of events and deliveries. Knows nothing of publishers and handlers."""

# No `from __future__ import annotations` here. `DomainEvent.__module__` is `eventkit`, so the names
# in its annotations would be looked up there, and `eventkit` has neither UUID nor datetime.
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha1
from typing import Protocol
from uuid import UUID, uuid4


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainEvent:
    """An optional base class for events. It adds an id and a time to each event.

        @dataclass(frozen=True, slots=True)
        class UserCreated(DomainEvent):
            user_id: int

        assert UserCreated(1) == UserCreated(1)

    Both fields get their values by themselves. They are keyword-only, so a subclass can have
    positional fields. Comparisons ignore them, so two events with the same payload are equal.

    Attributes:
        event_id: A random UUID.
        occurred_at: Time at which the event object was created: an aware datetime in UTC.
    """

    event_id: UUID = field(default_factory=uuid4, compare=False)
    occurred_at: datetime = field(default_factory=lambda: datetime.now(UTC), compare=False)


class Publisher(Protocol):
    """The protocol of everything that can publish: the only part of eventkit a use case needs.

        def create_user(events: Publisher, email: str) -> None:
            events.publish(UserCreated(email))

    `EventBus`, `EventContext` and `eventkit.testing.EventRecorder` are publishers.
    """

    def publish(self, *events: object, even_on_failure: bool = False) -> None:
        """Publish events. See `EventBus.publish`.

        Args:
            events: Instances of any class.
            even_on_failure: If True, the events are delivered also if the unit of work fails.
        """
        ...


_run_of_this_program = uuid4().bytes
# `_KIND`: the bits of a UUID that say its version and variant. `_VERSION_5`: their values for
# version 5 (RFC 9562).
_KIND = 0xF000 << 64 | 0xC000 << 48
_VERSION_5 = 0x5000 << 64 | 0x8000 << 48
_ROOM = 0xFFFF  # the low bits, which number the handlers of one event


def ids_of(published_ns: int, number: int, indexes: Iterable[int]) -> list[UUID]:
    """The id of the publish with this number, then the ids of its deliveries to these handlers.

    The hash is the most expensive part, so there is only one. It gives the id of the publish. The
    id of a delivery is that number plus the handler's index plus 1.
    """
    # A forked worker continues its parent's numbers, so the name has the process id, too.
    name = f"{os.getpid()}:{published_ns}:{number}".encode()
    digest = sha1(_run_of_this_program + name, usedforsecurity=False).digest()
    first = int.from_bytes(digest[:16]) & ~(_KIND | _ROOM) | _VERSION_5
    return [UUID(int=first), *[UUID(int=first + 1 + index) for index in indexes]]


@dataclass(frozen=True, slots=True)
class Incoming:
    """The message of another service from which an event was read.

    Attributes:
        event_id: The id of the event, from the message.
        headers: The headers of the message.
    """

    event_id: UUID
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Delivery:
    """One event for one handler, as observers and `current_delivery()` see it.

        @bus.on(OrderPaid)
        async def charge(event: OrderPaid) -> None:
            await payments.charge(event.order_id, idempotency_key=str(current_delivery().id))

    Attributes:
        event: The event itself.
        handler: Stable name of the handler: `module:qualname`, or the `name=` of the subscription.
        cause: The delivery whose handler published the event; None if no handler published it.
        depth: Number of deliveries that led to this one; 0 for an event that no handler published.
        attempt: Number of this try, from 1 on.
        attempts: Highest number of tries of a durable delivery; 1 for all others.
        published_from: Place where the event was published, as `file:line`. None unless the bus is
            in debug mode.
    """

    event: object
    handler: str
    cause: "Delivery | None"
    depth: int
    attempt: int
    _published_ns: int
    _number: tuple[int, int]
    published_from: str | None = None
    attempts: int = 1
    _kept: tuple[UUID, UUID] | None = None  # if read from a table: its id and the event's id
    _incoming: Incoming | None = None

    @property
    def id(self) -> UUID:
        """Id of the delivery: the same in every attempt, and different for every delivery.

        Use it as an idempotency key. It is computed when it is read, because a random id would be
        the most expensive part of a publish.
        """
        if self._kept:
            return self._kept[0]
        number, index = self._number
        return ids_of(self._published_ns, number, [index])[1]

    @property
    def event_id(self) -> UUID:
        """Id of the event: the same for all deliveries of one publish.

        It is the `event_id` of a `DomainEvent`. For an event from a message of another service, it
        is the id in the message. For other events, each publish makes a new id, also if the same
        object is published twice.
        """
        if self._kept:
            return self._kept[1]
        if self._incoming is not None:
            return self._incoming.event_id
        if isinstance(self.event, DomainEvent):
            return self.event.event_id
        return ids_of(self._published_ns, self._number[0], ())[0]

    @property
    def received(self) -> Mapping[str, str] | None:
        """The headers of the message of another service from which the event was read.

        None for an event that was published in this service, also if a handler published it that
        runs for such a message. The headers are the same if the delivery runs from an outbox.
        """
        return None if self._incoming is None else self._incoming.headers

    @property
    def published_at(self) -> datetime:
        """Time at which the event was published: an aware datetime in UTC."""
        return datetime.fromtimestamp(self._published_ns / 1e9, UTC)

    def chain(self) -> "list[Delivery]":
        """Return the deliveries that led to this one, oldest first; this delivery is the last."""
        chain: list[Delivery] = [self]
        while (cause := chain[-1].cause) is not None:
            chain.append(cause)
        return chain[::-1]

    def __str__(self) -> str:
        return f"{type_name(type(self.event))} -> {self.handler}"

    def __repr__(self) -> str:
        # Without the payload: it may be long or secret, and its repr is user code.
        cause = "" if self.cause is None else f", caused by {self.cause}"
        again = "" if self.attempt == 1 else f", attempt {self.attempt}"
        return f"<Delivery {self}{again}{cause}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Delivery):
            return NotImplemented
        return self._number == other._number and self.event is other.event

    def __hash__(self) -> int:
        return hash(self._number)


def type_name(event_type: type) -> str:
    """The name of an event type in messages and logs."""
    return f"{event_type.__module__}.{event_type.__qualname__}"
