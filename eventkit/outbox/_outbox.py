"""Owns the outbox of a bus: the way of rows into transactions, and what people do with rows.

Knows no HTTP and no SQL text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, cast
from uuid import UUID, uuid4

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import scoped_session, sessionmaker

from eventkit._core.bus import EventBus, state_of
from eventkit._core.events import DomainEvent, Incoming
from eventkit._core.turns import DrainReport
from eventkit.outbox._catalog import Catalog
from eventkit.outbox._database import Database
from eventkit.outbox._holdings import Holdings
from eventkit.outbox._keeper import Keeper
from eventkit.outbox._receive import receive
from eventkit.outbox._relay import POLL, run_due, run_until_cancelled
from eventkit.outbox._rows import LONGEST_INDEXED
from eventkit.outbox._store import Batch, OutboxStats, Store, StoredDelivery, in_batches
from eventkit.sqlalchemy import CommitTie, deliver_on_commit

CONCURRENCY = 4  # as the middleware's


class Outbox:
    """Keeps the deliveries of durable handlers in a table, until they are done.

        outbox = Outbox(bus, engine)  # once, where the application is wired

    It ties the bus to the engine as `deliver_on_commit` does. A delivery to a durable handler is
    an ordinary one that also has a row: the row is written right before the COMMIT of the
    transaction that decides the event, and deleted after the handler has ended. Where the process
    dies in between, another one runs the delivery, at the latest two seconds after the lease. A
    process that is alone and is started again waits for a whole lease from its start.

    The tables are made by your migrations or `create_all`: `add_tables(Base.metadata)`. What is due
    runs in applications with `EventContextMiddleware` from the end of their start-up on, in a
    process of its own with `run` or the command `eventkit relay`, and in `run_due`.

    Also a context manager that detaches at the end of the block.

    Args:
        bus: The bus whose durable handlers they are.
        engine: As for `deliver_on_commit`: an engine, or a factory of sessions that leads to one.
            PostgreSQL from 12 on, or SQLite from 3.35 on. With SQLite in memory nothing is kept.
        lease: Seconds after which others take over what a process has not renewed.
        relay: Whether durable handlers run in this process. With False it only writes rows.
        concurrency: How many deliveries run at once from the table; by default as many as the
            middleware's `concurrency`, else 4.
        schema: Where the tables are; by default where the engine's connections find them.
        store: The engine for the outbox's own connections, at most three; by default a twin of
            `engine`, which shares nothing of its pool.

    Attributes:
        bus: As given.
        concurrency: As given; what is assigned holds for relays that begin later.
        detached: Whether it has ended.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: The bus has an outbox, or is tied to the engine; or the engine commits each
            statement by itself, is of another database, or has none; or a number is too small.
        InvalidEventTypeError: Events of a durable handler cannot be stored.
    """

    def __init__(
        self,
        bus: EventBus,
        engine: Any,  # Any: as `deliver_on_commit`, which says what it takes
        *,
        lease: float = 15.0,
        relay: bool = True,
        concurrency: int | None = None,
        schema: str | None = None,
        store: Engine | AsyncEngine | None = None,
    ) -> None:
        if not isinstance(bus, EventBus):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Outbox() takes an EventBus first, not {bus!r}")
        if lease < 3 * POLL:
            raise ValueError(
                f"lease takes seconds of at least {3 * POLL:g}, three looks of a relay "
                f"into the table, not {lease!r}"
            )
        if concurrency is not None and concurrency < 1:
            raise ValueError(f"concurrency is at least 1, not {concurrency!r}")
        state = state_of(bus)
        if state.keeper is not None:
            raise ValueError(
                f"{bus!r} has an outbox already: one per bus, where the application is wired"
            )
        self.bus: EventBus = bus
        self._state = state
        catalog = Catalog(bus)
        catalog.admit_all()
        found = _engine_of(engine)
        database = Database(found, store, busy_timeout=lease / 3)
        self.concurrency: int | None = concurrency
        self._holdings = Holdings(
            state, catalog, database, Store(database.dialect, schema), lease, relays=relay
        )
        root = found.sync_engine if isinstance(found, AsyncEngine) else found
        self._keeper = Keeper(self, state, self._holdings, _tied(bus, engine), root)
        self.detached: bool = False
        state.keeper = self._keeper

    def detach(self) -> None:
        """End the tie, the lease and the outbox's own connections. What is kept stays in the table.

        For tests, and where a bus outlives its engine. As often as you like.
        """
        if self.detached:
            return
        self.detached = True
        self._keeper.detach()
        self._state.keeper = None
        self._holdings.close()

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"<Outbox of {self.bus!r}>"

    # Relays

    async def run(self, *, shutdown_timeout: float = 20.0) -> None:
        """Be a relay until cancelled: run what is due, for a process that serves no requests.

        The command `eventkit relay` does so until SIGTERM. Durable handlers run here even where
        the outbox was made with `relay=False`.

        Handlers get their dependencies as in a job. What runs when it is cancelled may go on for
        `shutdown_timeout` seconds; the rest is given back to the table.

        Raises:
            OutboxSchemaError: The tables are missing, or of another version.
            RuntimeError: An `AsyncEngine` on trio.
        """
        concurrency = self.concurrency or CONCURRENCY
        await run_until_cancelled(self._holdings, self._state, concurrency, shutdown_timeout)

    async def run_due(self, within: float = 0.0) -> DrainReport:
        """Run what is due, here and now, until nothing is; for tests, cron, and serverless.

        Handlers get their dependencies from the application whose request or lifespan this is
        called in, or whose lifespan is on this event loop. Beside a relay it may return while the
        relay still runs rows. It takes over nothing from processes that were killed: that is for a
        relay, which sees them for a whole lease.

        Args:
            within: Also what is due in so many seconds, as if they were over. With a large number
                a delivery that fails is tried until its attempts are used up.
        """
        return await run_due(self._holdings, self._state, self.concurrency or CONCURRENCY, within)

    # Messages of other services

    async def receive(
        self,
        event: object,
        *,
        consumer: str,
        message_id: str,
        headers: Mapping[str, str] = {},
        event_id: UUID | None = None,
    ) -> bool:
        """Take over an event that was read from a message of another service.

            await outbox.receive(event, consumer="billing", message_id=message.id)
            await message.ack()

        One transaction on the outbox's own connection notes the message, and writes the deliveries
        of durable handlers. When this returns they are committed, so acknowledge the message to
        its broker afterwards. A message that this consumer has received within the last seven days
        is dropped: nothing is written or counted, and no handler runs.

        After the commit durable handlers run as after a commit of yours, at least once, and the
        others at most once. The tasks of an application with `EventContextMiddleware` on this event
        loop run them, as with `bus.context(background=True)`. Where there is none, or where
        more than half of its `max_pending` deliveries wait, they run before this returns: whoever
        receives messages one by one then receives no more than can be handled. Handlers that fail
        are reported, and not raised here.

        It is a unit of work of its own, also inside of another one, as is
        `bus.context(independent=True)`; no transaction of yours takes part. Call it in as many
        tasks as you like, and on the event loop that handlers are to run on.

        What is raised before or by the commit comes out of here: then no handler has run, so have
        the broker hand the message out again. The commit may have happened all the same, as where
        this is cancelled while it commits. Then the message is dropped when it comes again, and its
        durable handlers run within the lease. A cancellation after the commit ends handlers that
        are awaited here: durable ones run later, the others do not.

        In an `in_memory` block, and with SQLite in memory, nothing is kept: all handlers run in
        memory, and no message is taken for an old one.

        Args:
            event: What was read from the message.
            consumer: Who has received it, by a name that stays: of the service, or of the queue.
            message_id: The same each time the broker hands the message out, and each time its
                publisher sends it, if that may happen twice.
            headers: What `current_delivery().received` gives in its handlers, also in later runs.
            event_id: What `current_delivery().event_id` gives there; by default the event's own if
                it is a `DomainEvent`, else a new one.

        Returns:
            True if the message is new, False if it was received before. Acknowledge both.

        Raises:
            ValueError: The consumer or the id is empty, too long, or has a null character. Or the
                key of a durable handler is, or its function failed.
            EventEncodingError: The event cannot be stored.
            EventDepthError: Called in a handler, too many handlers deep.
            InvalidEventTypeError: As in `EventBus.publish`.
            OutboxSchemaError: The tables are missing, or of another version.
            RuntimeError: The outbox is detached. Or an `AsyncEngine` on trio.
            Exception: What the database raised.
        """
        if self.detached:
            raise RuntimeError(f"{self!r} is detached, so it receives nothing: make another one")
        for name, value in (("consumer", consumer), ("message_id", message_id)):
            _refuse_text(name, value)
        if event_id is None:
            event_id = event.event_id if isinstance(event, DomainEvent) else uuid4()
        incoming = Incoming(event_id, {**headers})
        receiving = receive(self._state, self._keeper, event, incoming, consumer, message_id)
        del event  # or a traceback that shows local variables shows the payload
        return await receiving

    # Operations

    @property
    def healthy(self) -> bool:
        """Whether this process runs what is due: for readiness, never for liveness.

        The lease is valid by the local clock, and each relay has looked into the table within
        three polls. Asks no database. False where nothing is run: with `relay=False`, and before
        an application has started up.
        """
        relays = self._holdings.looking
        valid = self._holdings.lease.is_valid
        return bool(relays) and valid and all(each.is_looking for each in relays)

    @contextmanager
    def in_memory(self) -> Generator[None]:
        """Durable handlers run in memory in the block, and nothing is kept. For tests.

        For suites whose outer transaction is rolled back in the end. Events are encoded all the
        same.
        """
        self._keeper.memory += 1
        try:
            yield
        finally:
            self._keeper.memory -= 1

    def schema(self) -> str:
        """The statements that make the tables, as text. For those who migrate by hand."""
        return self._holdings.store.ddl()

    async def deliveries(
        self, state: str | None = "dead", handler: str | None = None, limit: int = 100
    ) -> list[StoredDelivery]:
        """What is kept, without payloads, ordered by when it is or was due.

        Args:
            state: "ready", "leased", "dead" or "unreadable"; None for all.
            handler: Only those of this handler.
            limit: At most so many.
        """
        read = partial(self._holdings.store.deliveries, state=state, handler=handler, limit=limit)
        return await self._holdings.database.run(read, writes=False)

    async def get(self, id: UUID) -> StoredDelivery | None:
        """One delivery with its payload; None where it is not kept any more."""
        return await self._holdings.database.run(
            partial(self._holdings.store.get, id_=id), writes=False
        )

    async def retry(
        self,
        ids: Iterable[UUID] | None = None,
        *,
        handler: str | None = None,
        before: timedelta | float | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Have dead and unreadable deliveries tried again, from the first attempt on.

        Args:
            ids: Which ones.
            handler: All of this handler.
            before: All that were published longer ago; seconds, or a `timedelta`.
            progress: Called with how many are changed so far, now and then.

        Returns:
            How many.

        Raises:
            ValueError: Nothing says which ones.
        """
        chosen = _chosen(ids, handler=handler, before=before)
        count = await in_batches(
            self._change, partial(self._holdings.store.retry, **chosen), progress
        )
        self._holdings.wake()
        return count

    async def drop(
        self,
        ids: Iterable[UUID] | None = None,
        *,
        handler: str | None = None,
        before: timedelta | float | None = None,
        state: str | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Delete deliveries, also those that are still to run, but for those that are running.

        With `state`, only those that are "ready", "dead" or "unreadable". Other arguments, result
        and errors are as of `retry`.
        """
        chosen = _chosen(ids, handler=handler, before=before, state=state)
        return await in_batches(
            self._change, partial(self._holdings.store.drop, **chosen), progress
        )

    async def count(
        self,
        ids: Iterable[UUID] | None = None,
        *,
        handler: str | None = None,
        before: timedelta | float | None = None,
    ) -> Mapping[tuple[str, str], int]:
        """How many deliveries there are, by handler and state: what `drop` would meet.

        The arguments are those of `retry`, and without any it counts all.
        """
        read = partial(self._holdings.store.count, ids=ids, handler=handler, before=before)
        return await self._holdings.database.run(read, writes=False)

    async def _change(self, function: Callable[[Connection], Batch]) -> Batch:
        return await self._holdings.database.run(function)

    async def stats(self) -> OutboxStats:
        """How many deliveries are in which state, in all and by handler. Reads the whole table."""
        counted = await self._holdings.database.run(self._counting(), writes=False)
        return replace(counted, lost=self._holdings.lost)

    def read_stats(self) -> OutboxStats:
        """As `stats`, for a thread that has no event loop, such as a metrics exporter's. Blocks."""
        counted = self._holdings.database.call(self._counting(), writes=False)
        return replace(counted, lost=self._holdings.lost)

    def _counting(self) -> Callable[[Connection], OutboxStats]:
        return partial(self._holdings.store.stats, known=self._holdings.catalog.known())


def holdings_of(outbox: Outbox) -> Holdings:
    """What its process holds of the table, for the command."""
    return outbox._holdings  # noqa: SLF001 - the one door to it


def outbox_of(bus: EventBus) -> Outbox | None:
    """The outbox that a bus has, for the command."""
    keeper = state_of(bus).keeper
    outbox = keeper.outbox if isinstance(keeper, Keeper) else None
    return outbox if isinstance(outbox, Outbox) else None


def _tied(bus: EventBus, engine: Any) -> CommitTie:  # Any: as `deliver_on_commit`
    try:
        return deliver_on_commit(bus, engine)
    except ValueError as error:
        raise ValueError(
            f"{error}. Outbox() ties the engine itself: remove the line with deliver_on_commit()"
        ) from None


def _engine_of(given: Any) -> Engine | AsyncEngine:  # Any: as `deliver_on_commit`
    """The engine that the outbox's own connections go to."""
    found: Any = given
    if isinstance(found, scoped_session | async_scoped_session):
        found = cast("Any", found).session_factory
    if isinstance(found, sessionmaker | async_sessionmaker):
        found = found.kw.get("bind")
    if isinstance(found, Engine | AsyncEngine):
        return found
    shown = "a str" if isinstance(given, str) else repr(given)  # a URL may have a password
    raise ValueError(
        f"Outbox() needs an engine, and {shown} leads to none: give it the engine itself"
    )


def _refuse_text(name: str, value: str) -> None:
    """Refuse what no inbox can tell messages by."""
    what = {
        "consumer": "the name of the service or of the queue",
        "message_id": "an id of the message that is the same each time it comes",
    }[name]
    if not value:
        raise ValueError(f"receive() was given an empty {name}: give it {what}")
    if "\0" in value:
        raise ValueError(
            f"the {name} {value!r} has a null character, which PostgreSQL does not store: give "
            f"receive() {what}, without one"
        )
    if len(value.encode()) > LONGEST_INDEXED:
        raise ValueError(
            f"the {name} has more than {LONGEST_INDEXED} bytes, which PostgreSQL does not index: "
            f"give receive() {what}, or a hash of it"
        )


def _chosen(ids: Iterable[UUID] | None, **others: object) -> dict[str, Any]:
    """What `retry` and `drop` of the store take. Any: of several types."""
    return {"ids": None if ids is None else [*ids], **others}
