"""Owns what is known in memory of rows: from the publish of an event to the outcomes of its runs.

Knows no SQL and no event loop. In memory each row that this process leases is a `Row`, which its
event holds, and which the outbox knows weakly. Whatever drops the event frees its rows.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from types import TracebackType
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from structlog.contextvars import bind_contextvars, get_contextvars

from eventkit._core.ambient import NOTHING_CARRIED, carried
from eventkit._core.durable import Durable, doubling
from eventkit._core.events import Delivery, DomainEvent, Incoming, ids_of
from eventkit._core.log import log
from eventkit._core.observers import Observer, contained
from eventkit._core.queue import Envelope, Verdict
from eventkit._core.subscriptions import Plan
from eventkit.outbox._store import Claimed, NewEvent, NewRow

# What log lines of one request have in common, where an application binds it to structlog.
_CORRELATION = ("correlation_id", "request_id")
LONGEST_INDEXED = 1000  # bytes of a text; an index of PostgreSQL takes 2700 of all columns
_JITTER = 0.2
_LONGEST_PAUSE = 10 * 365 * 86400.0  # seconds; a time further away may be none that can be shown


class Holder(Protocol):
    """Who holds the rows of this process."""

    def term(self) -> object | None:
        """The term of the lease, whose rows this process may run; None if it has no lease."""
        ...

    def begin(self, row: Row) -> None:
        """A run of a row has begun."""

    def hear(self, outcome: Outcome) -> None:
        """A run of a row has ended."""


class Row:
    """A delivery that has a row, while this process may run it.

    Attributes:
        id: Of the delivery.
        handler: Its name.
        durable: How often it is tried, and when.
        key: What orders it among others of the handler; None where nothing does.
        attempt: Which one it is at.
        leased: Whether it was leased by this process.
        term: That of the lease in which it was. It runs in no other one: a process that has stood
            still has lost what it held, though it has a lease again.
        completed: Whether a commit of the handler's own has completed it.
        lost: Whether another process was given it meanwhile.
        ended: Whether an outcome of it is written down.
    """

    __slots__ = (
        "__weakref__",
        "attempt",
        "completed",
        "durable",
        "ended",
        "handler",
        "id",
        "key",
        "leased",
        "lost",
        "term",
    )

    def __init__(
        self, id: UUID, handler: str, durable: Durable, key: str | None, attempt: int = 1
    ) -> None:
        self.id = id
        self.handler = handler
        self.durable = durable
        self.key = key
        self.attempt = attempt
        self.leased = False
        self.term: object | None = None
        self.completed = False
        self.lost = False
        self.ended = False


class Outcome:
    """What has become of one run, until it is written down.

    Attributes:
        row: Of which row.
        error: What the handler raised; None where it ended well.
        pause: Seconds until the next attempt; None where none follows.
        unreadable: Whether the payload could not be decoded here.
        unused: Whether it did not come to an end, so that the attempt does not count.
        unsure: Whether it may be written already: who wrote it was cancelled meanwhile.
    """

    __slots__ = ("error", "pause", "row", "unreadable", "unsure", "unused")

    def __init__(
        self,
        row: Row,
        error: str | None = None,
        pause: float | None = None,
        *,
        unreadable: bool = False,
        unused: bool = False,
    ) -> None:
        self.row = row
        self.error = error
        self.pause = pause
        self.unreadable = unreadable
        self.unused = unused
        self.unsure = False

    @property
    def is_success(self) -> bool:
        """Whether the handler ended well."""
        return self.error is None and not self.unused

    @property
    def is_death(self) -> bool:
        """Whether no further attempt follows a failure."""
        return self.error is not None and self.pause is None and not self.unreadable


class EventRows(Observer):
    """The rows of one event, by the index of their delivery: what the core calls `Rows`.

    Attributes:
        written: Whether they are in the table, or in a transaction that is being committed.
        location: Where the event was published, as `file:line`; None for one that is delivered even
            on failure, and for what comes from the table.
    """

    def __init__(
        self, holder: Holder, rows: dict[int, Row], facts: NewEvent | None, location: str | None
    ) -> None:
        self.written: bool = facts is None
        self.location: str | None = location
        self.facts: NewEvent | None = facts
        self.rows: dict[int, Row] = rows
        self._holder = holder

    @property
    def observer(self) -> Observer:
        """Who is told of each run: itself."""
        return self

    def __contains__(self, index: object) -> bool:
        return self.written and index in self.rows

    def elsewhere(self) -> Sequence[int]:
        """Those that are not to run here: a relay's, or all where the lease has run out since."""
        if not self.written:
            return ()
        term = self._holder.term()
        return [
            index
            for index, row in self.rows.items()
            if not row.leased or term is None or row.term is not term
        ]

    def write(self, *, leased: bool, term: object | None) -> None:
        """They are in the table from now on, or in a transaction that is being committed."""
        self.written = True
        for row in self.rows.values():
            row.leased = leased and row.key is None
            row.term = term

    def enter(self, term: object | None) -> None:
        """They were leased in this term, which began in their transaction."""
        for row in self.rows.values():
            row.term = term

    def unwrite(self) -> None:
        """They are not: the transaction was not committed."""
        self.written = False

    def delivery(self, delivery: Delivery) -> AbstractContextManager[object]:
        """Hear how a run ends, if it is one of a row."""
        for row in self.rows.values():
            if row.handler == delivery.handler:
                return _Run(row, self._holder)
        return nullcontext()


class _Run:
    """One run of a row's handler, whose end is told to the outbox."""

    __slots__ = ("_holder", "_row")

    def __init__(self, row: Row, holder: Holder) -> None:
        self._row = row
        self._holder = holder

    def __enter__(self) -> None:
        self._holder.begin(self._row)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        row = self._row
        if exc is None:
            outcome = Outcome(row)
        elif not isinstance(exc, Exception | SystemExit):  # `sys.exit()` is the handler's own doing
            outcome = Outcome(row, unused=True)
        else:
            if row.completed:
                log(
                    logging.ERROR,
                    "a handler failed after complete_with had completed its delivery: it is not "
                    "tried again",
                    handler=row.handler,
                    delivery_id=str(row.id),
                )
            outcome = Outcome(row, describe(exc), pause_after(row, exc))
        self._holder.hear(outcome)


def pause_after(row: Row, error: BaseException) -> float | None:
    """Seconds until the next attempt; None where the delivery is given up."""
    if row.attempt >= row.durable.attempts:
        return None
    try:
        pause = row.durable.backoff(row.attempt, error)
        if pause is not None:
            pause = min(max(0.0, float(pause)), _LONGEST_PAUSE)
    except Exception as broken:  # noqa: BLE001 - it is user code
        log(
            logging.ERROR,
            "backoff failed, so the default pause holds",
            error=broken,
            handler=row.handler,
        )
        pause = doubling(row.attempt, error)
    if pause is None:
        return None
    return pause * random.uniform(1 - _JITTER, 1 + _JITTER)


def describe(error: BaseException) -> str:
    """The class of an error and the line that raised it; never its text, which may quote events."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    if traceback is None:
        return kind
    return f"{kind} at {traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"


def rows_of(
    envelope: Envelope,
    holder: Holder,
    *,
    name: str,
    payload: str,
    headers: Headers,
    location: str | None,
) -> EventRows:
    """The rows of an event that is being published.

    Args:
        envelope: The event, with its plan.
        holder: Whose rows they are.
        name: What the table calls its type.
        payload: The event as JSON.
        headers: What goes along with it.
        location: Where it was published, as `file:line`.

    Raises:
        TypeError: `key` of a handler gave something else than a text or None.
        ValueError: The text has a null character, or is too long.
    """
    plan, event, published_ns = envelope.plan, envelope.event, envelope.published_ns
    # Not those whose subscription was cancelled.
    indexes = [index for index in plan.durable if index in plan.indexes]
    event_id, *ids = ids_of(published_ns, envelope.number, indexes)
    if envelope.incoming is not None:
        event_id = envelope.incoming.event_id
    elif isinstance(event, DomainEvent):
        event_id = event.event_id
    rows: dict[int, Row] = {}
    for index, id_ in zip(indexes, ids, strict=True):
        declared = plan[index].declared
        durable = declared.durable
        assert durable is not None
        rows[index] = Row(id_, declared.name, durable, key_of(declared.name, durable, envelope))
    facts = NewEvent(
        event_id=event_id,
        event_type=name,
        payload=payload,
        headers=headers.dump(),
        depth=0 if envelope.cause is None else envelope.cause.depth + 1,
        published_at=published_ns / 1e9,
        rows=[NewRow(row.id, row.handler, row.key) for row in rows.values()],
    )
    return EventRows(holder, rows, facts, location)


def key_of(handler: str, durable: Durable, envelope: Envelope) -> str | None:
    """What orders the delivery among others of its handler."""
    if durable.key is None:
        return None
    key: object = durable.key(envelope.event)
    if isinstance(key, str) and "\0" in key:
        raise ValueError(
            f"the key of durable handler {handler} has a null character, which PostgreSQL does not "
            "store"
        )
    if isinstance(key, str) and len(key.encode()) > LONGEST_INDEXED:
        raise ValueError(
            f"the key of durable handler {handler} has more than {LONGEST_INDEXED} bytes, which "
            "PostgreSQL does not index: a hash of it orders deliveries as well"
        )
    if key is None or isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        return key
    raise TypeError(
        f"the key of durable handler {handler} is a text or None, not {type(key).__name__}: "
        "key=lambda event: str(event.order_id)"
    )


class Headers(NamedTuple):
    """What goes along with an event, beside its payload.

    A row keeps it as a JSON object that has an object for each of these that says something. So
    no name that an observer gives is confused with another. Rows of older versions have an object
    of texts: what was observed.

    Attributes:
        observed: Ids of structlog's, and what observers give.
        carried: Headers that go along with all that comes of the event.
        received: Those of the message that the event was read from; None where it was published.
    """

    observed: Mapping[str, str]
    carried: Mapping[str, str] = NOTHING_CARRIED
    received: Mapping[str, str] | None = None

    def dump(self) -> str | None:
        """As a row keeps it; None where there is nothing."""
        kept = {
            name: dict(headers)
            for name, headers in self._asdict().items()
            if headers or (headers is not None and name == "received")
        }
        return json.dumps(kept, default=str) if kept else None

    @classmethod
    def load(cls, text: str) -> Headers:
        """What a row keeps."""
        kept: dict[str, Any] = json.loads(text)  # Any: an object, or a text
        if not all(isinstance(each, dict) for each in kept.values()):
            return cls(kept)
        return cls(kept.get("observed", {}), kept.get("carried", {}), kept.get("received"))

    def restore(self, observers: Sequence[Observer]) -> None:
        """Put them back, in the context variables of the caller."""
        carried.set(self.carried)
        observed = self.observed
        bind_contextvars(**{name: observed[name] for name in _CORRELATION if name in observed})
        for observer in observers:
            with contained(observer):
                observer.restored(observed)


def headers_of(envelope: Envelope, observers: Sequence[Observer]) -> Headers:
    """What goes along with an event, in the context variables of its publisher."""
    bound = get_contextvars()
    observed = {name: str(bound[name]) for name in _CORRELATION if name in bound}
    for observer in observers:
        with contained(observer):
            observed.update(observer.headers(envelope.event))
    incoming = envelope.incoming
    return Headers(observed, carried.get(), None if incoming is None else incoming.headers)


class StoredEnvelope(Envelope):
    """One delivery from the table, which is run as that of an event that was published here."""

    __slots__ = ("claimed",)

    def __init__(
        self,
        claimed: Claimed,
        event: object,
        plan: Plan,
        variables: Context,
        number: int,
        rows: EventRows,
        headers: Mapping[str, str] | None,
    ) -> None:
        published_ns = round(claimed.published_at * 1e9)
        incoming = None if headers is None else Incoming(claimed.event_id, headers)
        super().__init__(
            event, plan, variables, None, published_ns, number, Verdict.RELEASED, None, incoming
        )
        self.claimed = claimed
        self.announced = True  # where it was published
        self.rows: Any = rows  # Any: the core's `Rows`, which this is

    def delivery(self, index: int) -> Delivery:
        """The delivery as it was at its publish, at its next attempt."""
        claimed, subscription = self.claimed, self.plan[index]
        return Delivery(
            event=self.event,
            handler=subscription.name,
            cause=None,
            depth=claimed.depth,
            attempt=claimed.attempt,
            attempts=self.plan.attempts(index),
            _published_ns=self.published_ns,
            _number=(self.number, index),
            _kept=(claimed.id, claimed.event_id),
            _incoming=self.incoming,
        )
