"""Owns rows in memory: from the publish of an event to the outcomes of its runs.

Knows no SQL and no event loop. A row that this process has leased is a `Row` object. The event in
its envelope keeps the object, and the outbox has a weak reference to it. So the row is freed with
the envelope.
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

# The ids that all log lines of one request share, if the application binds them in structlog.
_CORRELATION = ("correlation_id", "request_id")
LONGEST_INDEXED = 1000  # bytes of a text; an index of PostgreSQL takes 2700 for all its columns
_JITTER = 0.2
_LONGEST_PAUSE = 10 * 365 * 86400.0  # seconds; `datetime` cannot show every later time


class Holder(Protocol):
    """The part of `Holdings` that rows need."""

    def term(self) -> object | None:
        """Return the current term of the lease; None if the lease is not valid."""
        ...

    def begin(self, row: Row) -> None:
        """Note that a run of a row has begun."""

    def hear(self, outcome: Outcome) -> None:
        """Note that a run of a row has ended."""


class Row:
    """A delivery with a row, while this process may run it.

    Attributes:
        id: The id of the delivery.
        handler: The name of the handler.
        durable: The options of the handler: number and times of attempts.
        key: Deliveries to one handler with an equal key run in order. None: no order.
        attempt: The number of the current attempt.
        leased: Whether this process has leased the row.
        term: The term of the lease at that time. The row runs in this term only. After a break of
            the lease, another process may have the row.
        completed: Whether a commit has completed the delivery, by `complete_with`.
        lost: Whether another process has taken over the row.
        ended: Whether an outcome of the row is written.
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
    """The result of one run, until it is written.

    Attributes:
        row: The row.
        error: A description of the handler's exception; None if the handler has succeeded.
        pause: Seconds until the next attempt; None if there is none.
        unreadable: Whether the payload could not be decoded here.
        unused: Whether the run was cancelled, so that the attempt does not count.
        unsure: Whether it may be written already: the task that wrote it was cancelled.
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
        """Whether the handler has succeeded."""
        return self.error is None and not self.unused

    @property
    def is_death(self) -> bool:
        """Whether the handler has failed, and no attempt follows."""
        return self.error is not None and self.pause is None and not self.unreadable


class EventRows(Observer):
    """The rows of one event, by the index of their delivery. Implements the core's `Rows`.

    Attributes:
        written: Whether the rows are in the table, or in a transaction that is being committed.
        location: The place of the publish, as `file:line`. None for an event that is delivered even
            on failure, and for an event from the table.
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
        """The observer of each run: this object itself."""
        return self

    def __contains__(self, index: object) -> bool:
        return self.written and index in self.rows

    def elsewhere(self) -> Sequence[int]:
        """Return the rows that must not run here: not leased, or leased in a term that is over."""
        if not self.written:
            return ()
        term = self._holder.term()
        return [
            index
            for index, row in self.rows.items()
            if not row.leased or term is None or row.term is not term
        ]

    def write(self, *, leased: bool, term: object | None) -> None:
        """Note that the rows are in the table, or in a transaction that is being committed."""
        self.written = True
        for row in self.rows.values():
            row.leased = leased and row.key is None
            row.term = term

    def enter(self, term: object | None) -> None:
        """Set the term of rows whose own transaction has renewed the lease."""
        for row in self.rows.values():
            row.term = term

    def unwrite(self) -> None:
        """Note that the rows are not in the table: the transaction was not committed."""
        self.written = False

    def delivery(self, delivery: Delivery) -> AbstractContextManager[object]:
        """Observe a run, if its delivery has a row."""
        for row in self.rows.values():
            if row.handler == delivery.handler:
                return _Run(row, self._holder)
        return nullcontext()


class _Run:
    """One run of a row's handler. It reports its begin and its end to the holder."""

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
        elif not isinstance(exc, Exception | SystemExit):  # `sys.exit()` in a handler is a failure
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
    """Return the seconds until the next attempt; None if there is none."""
    if row.attempt >= row.durable.attempts:
        return None
    try:
        pause = row.durable.backoff(row.attempt, error)
        if pause is not None:
            pause = min(max(0.0, float(pause)), _LONGEST_PAUSE)
    except Exception as broken:  # noqa: BLE001 - `backoff` is user code
        log(
            logging.ERROR,
            "backoff failed, so the default pause is used",
            error=broken,
            handler=row.handler,
        )
        pause = doubling(row.attempt, error)
    if pause is None:
        return None
    return pause * random.uniform(1 - _JITTER, 1 + _JITTER)


def describe(error: BaseException) -> str:
    """Return the class of an error and the line that raised it. Its text may quote the event."""
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
    """Make the rows of an event that is being published.

    Args:
        envelope: The event, with its plan.
        holder: The holder of the rows.
        name: The stored name of the event's class.
        payload: The event as JSON.
        headers: The headers of the event.
        location: The place of the publish, as `file:line`.

    Raises:
        TypeError: The function `key` of a handler has returned neither a `str` nor None.
        ValueError: The key has a null character, or is too long.
    """
    plan, event, published_ns = envelope.plan, envelope.event, envelope.published_ns
    # Without handlers whose subscription was cancelled.
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
    """Return the key of the delivery to a handler; None if it has no order."""
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
            "PostgreSQL does not index: use a hash of the key"
        )
    if key is None or isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        return key
    raise TypeError(
        f"the key of durable handler {handler} has to be a str or None, not {type(key).__name__}: "
        "key=lambda event: str(event.order_id)"
    )


class Headers(NamedTuple):
    """The headers of an event.

    A row keeps them as a JSON object, with one inner object for each attribute that is not empty.
    So a header of an observer cannot have the name of another header. A row of an older version has
    one flat object: the observed headers.

    Attributes:
        observed: Ids from structlog's context variables, and headers from observers.
        carried: Headers that all events from the event's handlers get, too.
        received: The headers of the received message; None if the event was published here.
    """

    observed: Mapping[str, str]
    carried: Mapping[str, str] = NOTHING_CARRIED
    received: Mapping[str, str] | None = None

    def dump(self) -> str | None:
        """Return the headers as a row keeps them; None if there are none."""
        kept = {
            name: dict(headers)
            for name, headers in self._asdict().items()
            if headers or (headers is not None and name == "received")
        }
        return json.dumps(kept, default=str) if kept else None

    @classmethod
    def load(cls, text: str) -> Headers:
        """Read the headers of a row."""
        kept: dict[str, Any] = json.loads(text)  # Any: a dict, or a str in an older version
        if not all(isinstance(each, dict) for each in kept.values()):
            return cls(kept)
        return cls(kept.get("observed", {}), kept.get("carried", {}), kept.get("received"))

    def restore(self, observers: Sequence[Observer]) -> None:
        """Set the context variables of the caller from the headers, and call observers."""
        carried.set(self.carried)
        observed = self.observed
        bind_contextvars(**{name: observed[name] for name in _CORRELATION if name in observed})
        for observer in observers:
            with contained(observer):
                observer.restored(observed)


def headers_of(envelope: Envelope, observers: Sequence[Observer]) -> Headers:
    """Return the headers of an event. To be called with the context variables of the publish."""
    bound = get_contextvars()
    observed = {name: str(bound[name]) for name in _CORRELATION if name in bound}
    for observer in observers:
        with contained(observer):
            observed.update(observer.headers(envelope.event))
    incoming = envelope.incoming
    return Headers(observed, carried.get(), None if incoming is None else incoming.headers)


class StoredEnvelope(Envelope):
    """An envelope with one delivery from the table."""

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
        self.announced = True  # it was announced at its publish
        self.rows: Any = rows  # Any: the type in the core is its protocol `Rows`

    def delivery(self, index: int) -> Delivery:
        """Make the delivery with the ids of its publish, and with the number of this attempt."""
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
