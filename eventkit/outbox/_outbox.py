"""Owns the public `Outbox`: relays, received messages, and operations on rows.

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

CONCURRENCY = 4  # the default of the middleware


class Outbox:
    """Keeps the deliveries of durable handlers in a table until the handlers have ended.

        outbox = Outbox(bus, engine)  # once, where the application is wired

    The outbox ties the bus to the engine, as `deliver_on_commit` does. A delivery to a durable
    handler also has a row in a table:

    - The row is written right before the COMMIT of the transaction that decides the event.
    - The row is deleted after the handler has ended.
    - If the process dies in between, another process runs the delivery, at the latest two seconds
      after the lease has expired.
    - If the only process dies and is started again, it waits for a whole lease from its start.

    Your migrations or `create_all` make the tables: `add_tables(Base.metadata)`. Due deliveries run
    in three places: in applications with `EventContextMiddleware`, once they have started up; in a
    process with `run` or the command `eventkit relay`; and in `run_due`.

    The outbox is also a context manager. It detaches at the end of the block.

    Args:
        bus: The bus of the durable handlers.
        engine: An engine, or a factory of sessions that leads to one, as for `deliver_on_commit`.
            PostgreSQL from 12 on, or SQLite from 3.35 on. With SQLite in memory nothing is kept.
        lease: Seconds. Other processes take over deliveries with an older lease.
        relay: Whether durable handlers run in this process. With False it only writes rows.
        concurrency: How many deliveries from the table run at once. By default the `concurrency`
            of the middleware, else 4.
        schema: The database schema of the tables. By default the one that connections find.
        store: The engine for the outbox's own connections, at most three. By default a copy of
            `engine` with a pool of its own.

    Attributes:
        bus: The bus.
        concurrency: See above. An assigned value holds for relays that begin later.
        detached: Whether `detach` was called.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: The bus has an outbox or is tied to the engine already. Or the engine commits
            each statement by itself, or leads to no database or to an unsupported one. Or a number
            is too small.
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
                f"lease has to be at least {3 * POLL:g} seconds, three polls of a relay, not "
                f"{lease!r}"
            )
        if concurrency is not None and concurrency < 1:
            raise ValueError(f"concurrency is at least 1, not {concurrency!r}")
        state = state_of(bus)
        if state.keeper is not None:
            raise ValueError(f"{bus!r} has an outbox already: make one outbox for each bus, once")
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
        """End the tie, the lease and the outbox's own connections. Rows stay in the table.

        For tests, and for a bus that lives longer than its engine. A second call does nothing.
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
        """Run due deliveries until cancelled, in a process that serves no requests.

        The command `eventkit relay` calls it, and cancels it at SIGTERM. Durable handlers run here
        also if the outbox was made with `relay=False`. Handlers get their dependencies as in a job.

        Args:
            shutdown_timeout: Seconds that running handlers have after the cancellation. The other
                deliveries go back to the table at once.

        Raises:
            OutboxSchemaError: The tables are missing, or have another version.
            RuntimeError: The engine is an `AsyncEngine`, and the event loop is trio.
        """
        concurrency = self.concurrency or CONCURRENCY
        await run_until_cancelled(self._holdings, self._state, concurrency, shutdown_timeout)

    async def run_due(self, within: float = 0.0) -> DrainReport:
        """Run due deliveries now, until none is due. For tests, cron jobs and serverless functions.

        Handlers get their dependencies from an application: the one of the current request or
        lifespan, or the one with a lifespan on this event loop. If a relay runs, too, this may
        return while the relay still runs deliveries. It takes over nothing from killed processes:
        only a relay does, since it has to watch them for a whole lease.

        Args:
            within: Seconds. Also run what is due within this time, without waiting for it. With a
                large number, a failing delivery is tried until it has no attempts left.

        Returns:
            The numbers of handled and failed deliveries, and the failures.
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
        """Store and deliver an event that was read from a message of another service.

            await outbox.receive(event, consumer="billing", message_id=message.id)
            await message.ack()

        **The commit.** One transaction, on the outbox's own connection, stores the id of the
        message and the deliveries of durable handlers. Acknowledge the message after this call has
        returned: the transaction is committed then. A message that this consumer has received
        within the last seven days is dropped. Nothing is written or counted for it, and no handler
        runs.

        **The handlers.** After the commit durable handlers run at least once, and others at most
        once. If an application with `EventContextMiddleware` runs on this event loop, its tasks run
        them, as with `bus.context(background=True)`. If there is none, or more than half of its
        `max_pending` deliveries wait, the handlers run before this call returns. So a service that
        receives one message after the other cannot receive more than it can handle. Failures of
        handlers are reported, and not raised here.

        **The unit of work.** The call has a unit of work of its own, as
        `bus.context(independent=True)` has. No transaction of the caller takes part. Call it from
        any number of tasks, on the event loop of the handlers.

        **Errors and cancellation.** If this raises, no handler has run: let the broker deliver the
        message again. The commit may have happened, for instance if this was cancelled during the
        commit. Then the message is dropped when it comes again, and its durable handlers run within
        the lease. A cancellation after the commit ends the handlers that are awaited here. Durable
        ones run again later, the others do not.

        In an `in_memory` block, and with SQLite in memory, nothing is stored. All handlers run in
        memory, and no message is recognised as an old one.

        Args:
            event: The event that was read from the message.
            consumer: The name of the receiving service or queue. It has to stay the same.
            message_id: The id of the message. A message that comes twice has to have the same id,
                also if its publisher sends it twice.
            headers: The headers of the message. Handlers find them in
                `current_delivery().received`, also in later runs.
            event_id: The id for `current_delivery().event_id`. By default the `event_id` of a
                `DomainEvent`, else a new one.

        Returns:
            True if the message is new, False if it was received before. Acknowledge both.

        Raises:
            ValueError: `consumer`, `message_id` or the key of a durable handler is empty, too long,
                or has a null character. Or the function of a key failed.
            EventEncodingError: The event cannot be stored.
            EventDepthError: The call is in a handler, and handlers are nested too deeply.
            InvalidEventTypeError: As in `EventBus.publish`.
            OutboxSchemaError: The tables are missing, or have another version.
            RuntimeError: The outbox is detached. Or the engine is an `AsyncEngine`, on trio.
            Exception: The error of the database.
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
        """Whether this process runs due deliveries. For readiness probes, and not for liveness.

        True if the lease is valid by the local clock, and each relay has read the table within the
        last three polls. It asks no database. False where no relay runs: with `relay=False`, and
        before an application has started up.
        """
        relays = self._holdings.looking
        valid = self._holdings.lease.is_valid
        return bool(relays) and valid and all(each.is_looking for each in relays)

    @contextmanager
    def in_memory(self) -> Generator[None]:
        """Run durable handlers in memory inside the block, and store nothing. For tests.

        For test suites that roll back an outer transaction at the end. Events are still encoded, so
        a test finds an event that cannot be stored.
        """
        self._keeper.memory += 1
        try:
            yield
        finally:
            self._keeper.memory -= 1

    def schema(self) -> str:
        """Return the SQL statements that make the tables, for migrations by hand."""
        return self._holdings.store.ddl()

    async def deliveries(
        self, state: str | None = "dead", handler: str | None = None, limit: int = 100
    ) -> list[StoredDelivery]:
        """List stored deliveries, the longest due first, without payloads.

        Args:
            state: "ready", "leased", "dead" or "unreadable"; None for all.
            handler: Only deliveries to this handler.
            limit: How many at most.

        Raises:
            ValueError: There is no such state.
        """
        read = partial(self._holdings.store.deliveries, state=state, handler=handler, limit=limit)
        return await self._holdings.database.run(read, writes=False)

    async def get(self, id: UUID) -> StoredDelivery | None:
        """Return one delivery with its payload; None if it is no longer stored."""
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
        """Retry dead and unreadable deliveries. Their attempts are counted from one again.

        Args:
            ids: The ids of deliveries.
            handler: Only deliveries to this handler.
            before: Only deliveries of events older than this, in seconds or as a `timedelta`.
            progress: Called from time to time with the number of deliveries so far.

        Returns:
            The number of deliveries that will be tried again.

        Raises:
            TypeError: `ids` is a single id, or has an id that is no UUID.
            ValueError: None of `ids`, `handler` and `before` is given.
        """
        chosen = _chosen("retry", ids, handler=handler, before=before)
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
        """Delete deliveries permanently. Running ones stay.

        Args:
            ids: As for `retry`.
            handler: As for `retry`.
            before: As for `retry`.
            state: Only deliveries in this state: "ready", "dead" or "unreadable".
            progress: As for `retry`.

        Returns:
            The number of deleted deliveries.

        Raises:
            TypeError: As for `retry`.
            ValueError: None of `ids`, `handler` and `before` is given, or there is no such state.
        """
        chosen = _chosen("drop", ids, handler=handler, before=before, state=state)
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
        """Count deliveries by handler and state, before a `retry` or `drop`.

        Args:
            ids: As for `retry`.
            handler: As for `retry`.
            before: As for `retry`. Without any argument, all deliveries are counted.

        Raises:
            TypeError: As for `retry`.
        """
        chosen = _chosen("count", ids, handler=handler, before=before)
        read = partial(self._holdings.store.count, **chosen)
        return await self._holdings.database.run(read, writes=False)

    async def _change(self, function: Callable[[Connection], Batch]) -> Batch:
        return await self._holdings.database.run(function)

    async def stats(self) -> OutboxStats:
        """Count deliveries by state, in all and by handler. Reads the whole table."""
        counted = await self._holdings.database.run(self._counting(), writes=False)
        return replace(counted, lost=self._holdings.lost)

    def read_stats(self) -> OutboxStats:
        """Do the same as `stats` in a thread without event loop, such as an exporter's. Blocks."""
        counted = self._holdings.database.call(self._counting(), writes=False)
        return replace(counted, lost=self._holdings.lost)

    def _counting(self) -> Callable[[Connection], OutboxStats]:
        return partial(self._holdings.store.stats, known=self._holdings.catalog.known())


def holdings_of(outbox: Outbox) -> Holdings:
    """Return the holdings of an outbox, for the command."""
    return outbox._holdings  # noqa: SLF001 - the only access from outside


def outbox_of(bus: EventBus) -> Outbox | None:
    """Return the outbox of a bus, for the command."""
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
    """Return the engine for the outbox's own connections."""
    found: Any = given
    if isinstance(found, scoped_session | async_scoped_session):
        found = cast("Any", found).session_factory
    if isinstance(found, sessionmaker | async_sessionmaker):
        found = found.kw.get("bind")
    if isinstance(found, Engine | AsyncEngine):
        return found
    shown = "a str" if isinstance(given, str) else repr(given)  # a URL may have a password
    raise ValueError(f"Outbox() needs an engine, and {shown} leads to none: pass the engine itself")


def _refuse_text(name: str, value: str) -> None:
    """Refuse a text that an inbox cannot store, or that cannot identify a message."""
    what = {
        "consumer": "the name of the service or of the queue",
        "message_id": "an id that is the same each time the message comes",
    }[name]
    if not value:
        raise ValueError(f"the {name} of receive() is empty: pass {what}")
    if "\0" in value:
        raise ValueError(
            f"the {name} {value!r} has a null character, which PostgreSQL does not store: pass "
            f"{what}, without such a character"
        )
    if len(value.encode()) > LONGEST_INDEXED:
        raise ValueError(
            f"the {name} has more than {LONGEST_INDEXED} bytes, which PostgreSQL does not index: "
            f"pass {what}, or a hash of it"
        )


def _chosen(operation: str, ids: Iterable[UUID] | None, **others: object) -> dict[str, Any]:
    """Return the arguments for `retry`, `drop` and `count` of the store. Any: of several types.

    Raises:
        TypeError: `ids` is one id, or has something that is no UUID.
    """
    if ids is None:
        return {"ids": None, **others}
    given: object = ids  # by users, who may have no type checker
    if isinstance(given, UUID):
        raise TypeError(f"{operation}() takes a list of ids, not a single one: {operation}([id])")
    found: list[object] = [given] if isinstance(given, str) else [*ids]
    if not all(isinstance(each, UUID) for each in found):
        raise TypeError(
            f"{operation}() takes a list of UUIDs, not text: {operation}([UUID(text)]). The `id` "
            "of a delivery is a UUID already"
        )
    return {"ids": found, **others}
