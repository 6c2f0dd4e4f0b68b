"""Owns the data that travels: events and deliveries. Knows nothing of who sends or receives."""

# No `from __future__ import annotations` here: who evaluates the annotations of a DomainEvent looks
# names up in the module it says it is from, and the front door has neither UUID nor datetime.
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha1
from typing import Protocol
from uuid import UUID, uuid4


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainEvent:
    """An optional base for events: says which one it is, and when it happened.

    Both fields are keyword-only and generated, so a subclass adds plain positional fields; both
    are left out of comparisons, so two events with an equal payload are equal:

        @dataclass(frozen=True, slots=True)
        class UserCreated(DomainEvent):
            user_id: int

        assert UserCreated(1) == UserCreated(1)

    Attributes:
        event_id: A random UUID.
        occurred_at: When the event was made, aware, in UTC.
    """

    event_id: UUID = field(default_factory=uuid4, compare=False)
    occurred_at: datetime = field(default_factory=lambda: datetime.now(UTC), compare=False)


class Publisher(Protocol):
    """Whom application code tells what happened; all that a use case needs to know of eventkit.

    `EventBus` and `EventContext` are publishers, and so is anything with this method.
    """

    def publish(self, *events: object, even_on_failure: bool = False) -> None:
        """Say that something happened. See `EventBus.publish`."""
        ...


_run_of_this_program = uuid4().bytes
# Of 128 bits, those that say which kind of UUID it is; and what they say: version 5, RFC 9562.
_KIND = 0xF000 << 64 | 0xC000 << 48
_VERSION_5 = 0x5000 << 64 | 0x8000 << 48
_ROOM = 0xFFFF  # for the handlers of one event


def ids_of(published_ns: int, number: int, indexes: Iterable[int]) -> list[UUID]:
    """The id of the publish of this number, then those of its deliveries to these handlers.

    All come from one hash, because hashes are the dearest part of them: the deliveries are counted
    from the publish on.
    """
    # A forked worker goes on with its parent's numbers, so the process is part of it.
    name = f"{os.getpid()}:{published_ns}:{number}".encode()
    digest = sha1(_run_of_this_program + name, usedforsecurity=False).digest()
    first = int.from_bytes(digest[:16]) & ~(_KIND | _ROOM) | _VERSION_5
    return [UUID(int=first), *[UUID(int=first + 1 + index) for index in indexes]]


@dataclass(frozen=True, slots=True)
class Incoming:
    """The message of another service that an event was read from.

    Attributes:
        event_id: The event's id, by the message.
        headers: The headers of the message.
    """

    event_id: UUID
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Delivery:
    """One run of one handler for one event, as observers and `current_delivery()` see it.

    Attributes:
        event: The event itself.
        handler: The handler's stable name, `module:qualname` or what `name=` said.
        cause: The delivery whose handler published the event; None where no handler did.
        depth: How many deliveries led here; 0 for an event that no handler published.
        attempt: 1 for the first try.
        attempts: How often it is tried, if it is durable; else 1.
        published_from: Where the event was published, as `file:line`, if the bus is in debug mode.
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
    _kept: tuple[UUID, UUID] | None = None  # its id and the event's, where it comes from a table
    _incoming: Incoming | None = None

    @property
    def id(self) -> UUID:
        """The same for every look and every attempt, different for every delivery.

        Fit for an idempotency key. Computed when asked, because random ids would be the most
        expensive part of a publish.
        """
        if self._kept:
            return self._kept[0]
        number, index = self._number
        return ids_of(self._published_ns, number, [index])[1]

    @property
    def event_id(self) -> UUID:
        """The same for all deliveries of one publish: the event's own, if it is a `DomainEvent`.

        The same object that is published twice is two events, unless it brings its own id. Where
        the event was read from a message, it is the id that the message gave it.
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
        """The headers of the message of another service that the event was read from.

        None for an event that was published in this service, also by the handler of one that was
        received. The same in a run from an outbox's table.
        """
        return None if self._incoming is None else self._incoming.headers

    @property
    def published_at(self) -> datetime:
        """When the event was published, aware, in UTC."""
        return datetime.fromtimestamp(self._published_ns / 1e9, UTC)

    def chain(self) -> "list[Delivery]":
        """What led here, oldest first, ending with this delivery."""
        chain: list[Delivery] = [self]
        while (cause := chain[-1].cause) is not None:
            chain.append(cause)
        return chain[::-1]

    def __str__(self) -> str:
        return f"{type_name(type(self.event))} -> {self.handler}"

    def __repr__(self) -> str:
        # Without the payload, which may be long or secret, and whose repr is user code.
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
    """How an event type is called in messages and logs."""
    return f"{event_type.__module__}.{event_type.__qualname__}"
