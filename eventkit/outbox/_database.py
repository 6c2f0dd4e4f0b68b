"""Owns the outbox's own connections: the twin of the user's engine, and the threads that use it.

Knows nothing of tables, deliveries and leases: it opens a transaction, calls a function with the
connection, and commits.

The twin is an engine that connects as the user's engine does, with a pool of its own. With the pool
of the requests, the outbox would wait for connections under load. With a pool of one connection, it
would wait forever.

- The twin of a blocking engine is used in the caller's thread or in a worker thread.
- An `AsyncEngine` belongs to one event loop, so its twin has a thread with an event loop. This
  works while the event loops of the application are blocked, and needs no second driver.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextvars import Context
from functools import partial
from threading import Semaphore, Thread, current_thread
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from sqlalchemy import Connection, Dialect, Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import AssertionPool, Pool, QueuePool, SingletonThreadPool, StaticPool

from eventkit._core.locks import new_lock
from eventkit._core.loops.running import on_trio
from eventkit.sqlalchemy import root_of

_Result = TypeVar("_Result")
_Work = Callable[[Connection], _Result]

_ORDINARY = 2  # connections
_RESERVED = 1
_PATIENCE = 5.0  # seconds that `close` waits for transactions
# Seconds, if nobody called `close` before the end of the process or of the object.
_LAST_PATIENCE = 2.0
_OLDEST = {"postgresql": (12,), "sqlite": (3, 35)}
_WHICH = "the outbox needs PostgreSQL 12 or later, or SQLite 3.35 or later"
# Keys in `Connection.info`, which lasts as long as the driver's connection.
_BUSY_TIMEOUT_IS_SET = "eventkit_busy_timeout_is_set"
_IS_READ_COMMITTED = "eventkit_is_read_committed"


class Database:
    """Transactions on the outbox's own connections: at most three at once in a process.

    Two connections are for `call` and `run`, and one is reserved. If the pool has room for fewer,
    callers share the connections and wait for each other. All methods may be called in any thread.

    A forked child opens its own connections. It never uses, closes or frees the connections of its
    parent. On SQLite do not fork while a transaction is open: the child gets a copy of the
    library's locks, and no thread of the child releases them.

    Attributes:
        dialect: The dialect of the engine in use.
    """

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        own: Engine | AsyncEngine | None = None,
        *,
        busy_timeout: float = 5.0,
    ) -> None:
        """Opens no connection yet, so the user can still add event listeners to the engine.

        Args:
            engine: The outbox writes rows in transactions of this engine. The twin has the same
                dialect, pool class and pool events. The options of the engine are not applied. On
                PostgreSQL the twin always runs in READ COMMITTED.
            own: An engine to use instead of a twin, with its own options. Only the outbox should
                use its connections: the outbox's event loop uses those of an `AsyncEngine`, and
                `close` disposes of the engine.
            busy_timeout: Seconds. A transaction waits at least this long for SQLite's lock.

        Raises:
            ValueError: An engine commits each statement, or belongs to another database.
        """
        for each in [engine] if own is None else [engine, own]:
            _refuse(each)
        chosen = engine if own is None else own
        self.dialect: Dialect = chosen.dialect
        self._engine, self._own = engine, own
        self._url = chosen.url
        self._busy_timeout = round(busy_timeout * 1000)  # milliseconds
        self._is_in_memory: bool | None = None
        self._has_looked = False  # whether the version and the driver's mode have been checked
        self._lock = new_lock()
        # By process id. The link of a parent stays here, so that the child never frees it.
        self._links: dict[int, _Blocking | _Awaiting] = {}
        # One limiter for each event loop.
        self._limiter: RunVar[CapacityLimiter] = RunVar("eventkit_outbox_threads")
        weakref.finalize(self, _close, self._links, _LAST_PATIENCE)

    @property
    def awaits(self) -> bool:
        """Whether the engine in use is an `AsyncEngine`."""
        return isinstance(self._engine if self._own is None else self._own, AsyncEngine)

    @property
    def address(self) -> str:
        """The URL of the engine for messages: without password and query."""
        return self._url.set(query={}).render_as_string(hide_password=True)

    @property
    def is_in_memory(self) -> bool:
        """Whether this is SQLite without a file. Each connection may then have its own database.

        If the URL names no file, the database is asked once: `create_engine(creator=...)` may open
        a file that the URL does not name.
        """
        if self._is_in_memory is None:
            self._is_in_memory = self.dialect.name == "sqlite" and not self._has_file()
        return self._is_in_memory

    def _has_file(self) -> bool:
        name = self._url.database or ""
        if name and ":memory:" not in name and self._url.query.get("mode") != "memory":
            return True
        try:
            return self.call(_opens_a_file, writes=False)
        finally:
            self.close()

    def call(
        self, function: _Work[_Result], *, writes: bool = True, reserved: bool = False
    ) -> _Result:
        """Call a function in a transaction, commit, and return its result. Blocks the thread.

        Args:
            function: It gets a connection with an open transaction. With an `AsyncEngine` it runs
                in the outbox's thread, so it must not block.
            writes: Whether the function may write. On SQLite a writing transaction takes the lock
                at its begin. A later lock fails if another transaction has written since the begin.
            reserved: Use the reserved connection. For the lease, which must not wait.

        Raises:
            BaseException: The error of the function, after a rollback. Or the error of the
                database.
            ValueError: The version of the server, or of SQLite's library, is too old.
        """
        return self._link().call(partial(self._transact, function, writes), reserved)

    async def run(self, function: _Work[_Result], *, writes: bool = True) -> _Result:
        """Do the same as `call` without blocking the event loop. At most two run at once.

        A cancellation ends the call at once, and cancels no running transaction:

        - A transaction that has not begun never begins.
        - A transaction that has begun runs to its end. Its result or error is dropped, so the
          caller does not know whether it was committed.

        Raises:
            RuntimeError: The engine is an `AsyncEngine`, and the event loop is trio.
        """
        work = partial(self._transact, function, writes)
        link = self._link()
        if isinstance(link, _Blocking):
            return await link.run(work, self._threads())
        if on_trio():
            raise RuntimeError(
                f"{link.engine!r} works on asyncio only: on trio use a blocking engine"
            )
        return await asyncio.wrap_future(link.submit(work, reserved=False))

    def close(self) -> None:
        """End the thread and the connections. The next `call` or `run` opens new ones.

        Waits for open transactions, at most five seconds. Then the open transactions of an
        `AsyncEngine` are cancelled, and their callers get a `RuntimeError`.
        """
        _close(self._links, _PATIENCE)

    def _link(self) -> _Blocking | _Awaiting:
        with self._lock:
            link = self._links.get(os.getpid())
            if link is None:
                link = self._links[os.getpid()] = self._connect()
            return link

    def _connect(self) -> _Blocking | _Awaiting:
        if self._own is None:
            engine = _twin_of(self._engine)
        else:
            engine = self._own
            if self._links:  # this is a forked child, and the pool has connections of its parent
                root_of(engine).dispose(close=False)
        return _Awaiting(engine) if isinstance(engine, AsyncEngine) else _Blocking(engine)

    def _threads(self) -> CapacityLimiter:
        try:
            return self._limiter.get()
        except LookupError:
            self._limiter.set(limiter := CapacityLimiter(_ORDINARY))
            return limiter

    def _transact(self, function: _Work[_Result], writes: bool, connection: Connection) -> _Result:
        if self._own is None and connection.dialect.name == "postgresql":
            _read_committed(connection)
        with connection.begin():
            if not self._has_looked:
                self._has_looked = _is_right(connection)
            if connection.dialect.name == "sqlite":
                self._begin_on_sqlite(connection, writes)
            return function(connection)

    def _begin_on_sqlite(self, connection: Connection, writes: bool) -> None:
        """Begin with a statement: the driver would begin at the first write, or not at all."""
        if _BUSY_TIMEOUT_IS_SET not in connection.info:
            timeout = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
            if timeout < self._busy_timeout:
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {self._busy_timeout}")
            connection.info[_BUSY_TIMEOUT_IS_SET] = True
        # A listener for all engines may have begun a transaction, and `autocommit=False` does.
        if not _driver_of(connection).in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class _Blocking:
    """A link with a blocking engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pool = engine.pool  # kept: a forked child must not free its parent's connections
        ordinary, reserved = _turns(engine.pool)
        self._ordinary = Semaphore(ordinary)
        self._reserved = Semaphore(reserved) if reserved else self._ordinary
        self._count = ordinary, reserved
        # This pool keeps one connection per thread, and worker threads end.
        self._forgets = isinstance(engine.pool, SingletonThreadPool)

    def call(self, work: _Work[_Result], reserved: bool) -> _Result:
        with self._reserved if reserved else self._ordinary:
            return self._perform(work)

    async def run(self, work: _Work[_Result], limiter: CapacityLimiter) -> _Result:
        ticket: Future[_Result] = Future()
        try:
            await to_thread.run_sync(
                self._fulfil, ticket, work, limiter=limiter, abandon_on_cancel=True
            )
            return ticket.result()
        finally:
            ticket.cancel()
            del ticket  # else a reference cycle: ticket, its exception, traceback, this frame

    def _fulfil(self, ticket: Future[_Result], work: _Work[_Result]) -> None:
        with self._ordinary:
            if ticket.set_running_or_notify_cancel():
                try:
                    result = self._perform(work)
                except BaseException as error:  # noqa: BLE001 - raised where the ticket is waited for
                    ticket.set_exception(error)
                else:
                    ticket.set_result(result)

    def _perform(self, work: _Work[_Result]) -> _Result:
        with self._engine.connect() as connection:
            try:
                return work(connection)
            finally:
                if self._forgets:
                    connection.invalidate()

    def close(self, patience: float) -> None:
        ordinary, reserved = self._count
        wanted = [self._ordinary] * ordinary + [self._reserved] * reserved
        held = [turn for turn in wanted if turn.acquire(timeout=patience)]
        self._engine.dispose()
        for turn in held:
            turn.release()


class _Awaiting:
    """A link with an `AsyncEngine`. Its thread starts at the first call."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._pool = engine.pool  # kept: a forked child must not free its parent's connections
        self._lock = new_lock()
        self._thread: _LoopThread | None = None

    def call(self, work: _Work[_Result], reserved: bool) -> _Result:
        return self.submit(work, reserved).result()

    def submit(self, work: _Work[_Result], reserved: bool) -> Future[_Result]:
        """Run the function in the thread. If the ticket is cancelled first, it never begins."""
        ticket: Future[_Result] = Future()
        with self._lock:
            if self._thread is None:
                self._thread = _LoopThread(self.engine)
            self._thread.post(ticket, work, reserved)
        return ticket

    def close(self, patience: float) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.end(patience)


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that counts as closed in a forked child.

    Without this, finalizers of asyncpg would close the connections when the child exits: they send
    a terminate message to the server, on sockets that the child shares with its parent.

    It is a SelectorEventLoop, because psycopg does not work on the default loop of Windows.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()

    def is_closed(self) -> bool:
        return super().is_closed() or self._pid != os.getpid()


class _LoopThread:
    """A thread with an event loop. Only this thread uses the engine's connections."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        ordinary, reserved = _turns(engine.pool)
        self._ordinary = asyncio.Semaphore(ordinary)
        self._reserved = asyncio.Semaphore(reserved) if reserved else self._ordinary
        self._tasks: set[asyncio.Task[None]] = set()  # changed on the loop only
        self._loop = _Loop()
        self._thread = Thread(target=_serve, args=[self._loop], name="eventkit-outbox", daemon=True)
        self._thread.start()

    def post(self, ticket: Future[_Result], work: _Work[_Result], reserved: bool) -> None:
        # An empty context: connections live longer than the request that opened them.
        self._loop.call_soon_threadsafe(self._begin, ticket, work, reserved, context=Context())

    def _begin(self, ticket: Future[Any], work: _Work[Any], reserved: bool) -> None:
        task = self._loop.create_task(self._fulfil(ticket, work, reserved))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fulfil(self, ticket: Future[_Result], work: _Work[_Result], reserved: bool) -> None:
        try:
            async with self._reserved if reserved else self._ordinary:
                if not ticket.set_running_or_notify_cancel():
                    return
                async with self._engine.connect() as connection:
                    result = await connection.run_sync(work)
        except asyncio.CancelledError:
            if ticket.running() or ticket.set_running_or_notify_cancel():
                closed = "the outbox's connections were closed during this call"
                ticket.set_exception(RuntimeError(closed))
        except BaseException as error:  # noqa: BLE001 - raised where the ticket is waited for
            ticket.set_exception(error)
        else:
            ticket.set_result(result)

    def end(self, patience: float) -> None:
        self._loop.call_soon_threadsafe(self._end_soon, patience, context=Context())
        if current_thread() is not self._thread:  # a finalizer may run in this very thread
            self._thread.join(3 * patience)

    def _end_soon(self, patience: float) -> None:
        self._ending = self._loop.create_task(self._end(patience))

    async def _end(self, patience: float) -> None:
        try:
            if self._tasks:
                _, late = await asyncio.wait(self._tasks, timeout=patience)
                for task in late:
                    task.cancel()
                if late:
                    await asyncio.wait(late, timeout=patience)
            await _within(patience, self._engine.dispose())
        finally:
            self._loop.stop()


async def _within(seconds: float, awaitable: Awaitable[None]) -> None:
    """Await, and ignore a timeout or an error. For a server that may be away at the very end."""
    try:
        await asyncio.wait_for(awaitable, seconds)
    except Exception:  # noqa: BLE001 - of the driver
        pass


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


def _close(links: dict[int, _Blocking | _Awaiting], patience: float) -> None:
    link = links.get(os.getpid())
    if link is not None:
        link.close(patience)


def _refuse(engine: Engine | AsyncEngine) -> None:
    if engine.dialect.name not in _OLDEST:
        raise ValueError(
            f"{_WHICH}, not {engine!r}: use deliver_on_commit, which works with other databases"
        )
    option = engine.get_execution_options().get("isolation_level")
    if "AUTOCOMMIT" in {_spelled(option), _isolation_level(engine.dialect)}:
        raise _autocommit(engine)


def _autocommit(engine: Engine | AsyncEngine) -> ValueError:
    return ValueError(
        f"{engine!r} is in AUTOCOMMIT mode, so nothing would be atomic: set AUTOCOMMIT on the "
        "connections that need it, with execution_options(isolation_level='AUTOCOMMIT')"
    )


def _is_right(connection: Connection) -> bool:
    """Check the version, and that the driver does not commit by itself. False: not known yet.

    Raises:
        ValueError: The version is too old, or the driver commits each statement.
    """
    dialect = connection.dialect
    if getattr(_driver_of(connection), "autocommit", None) is True:  # set without SQLAlchemy
        raise _autocommit(connection.engine)
    version = dialect.server_version_info
    if version is None:  # SQLAlchemy asks the server at its first connect, which may run now
        return False
    if version < _OLDEST[dialect.name]:
        found = ".".join(map(str, version))
        raise ValueError(f"{_WHICH}, and this is {found}: use deliver_on_commit")
    return True


def _isolation_level(dialect: Dialect) -> str | None:
    """The `isolation_level` of `create_engine`. SQLAlchemy keeps it only in this attribute."""
    return _spelled(getattr(dialect, "_on_connect_isolation_level", None))


def _spelled(level: str | None) -> str | None:
    """Normalize the level: users may write it in lower case and with underscores."""
    return None if level is None else level.upper().replace("_", " ")


def _twin_of(engine: Engine | AsyncEngine) -> Engine | AsyncEngine:
    """Make an engine that connects as the other one does, with a pool of its own.

    The new pool has copies of the listeners that the user has added so far. Later listeners are not
    copied.
    """
    root = root_of(engine)
    twin = Engine(
        root.pool.recreate(), root.dialect, root.url, hide_parameters=root.hide_parameters
    )
    return AsyncEngine(twin) if isinstance(engine, AsyncEngine) else twin


def _read_committed(connection: Connection) -> None:
    """Set READ COMMITTED once per connection. An engine's option is set again each time."""
    driver = connection.connection.dbapi_connection
    if driver is not None and _IS_READ_COMMITTED not in connection.info:
        connection.dialect.set_isolation_level(driver, "READ COMMITTED")
        connection.info[_IS_READ_COMMITTED] = True


def _turns(pool: Pool) -> tuple[int, int]:
    """Return how many callers may use ordinary connections at once, and how many the reserved one.

    Callers wait for this number, and not in the pool: the timeout of the pool is meant for
    requests.
    """
    room = _ORDINARY + _RESERVED
    if isinstance(pool, StaticPool | AssertionPool | SingletonThreadPool):
        room = 1  # SingletonThreadPool closes connections of other threads above its size
    elif isinstance(pool, QueuePool) and pool.size() > 0:
        overflow = pool._max_overflow  # noqa: SLF001 - there is no public attribute
        room = room if overflow < 0 else min(room, pool.size() + overflow)
    return (1, 0) if room == 1 else (room - _RESERVED, _RESERVED)


def _opens_a_file(connection: Connection) -> bool:
    # One row for each database: number, name, file (empty if in memory).
    return any(file for _, _, file in connection.exec_driver_sql("PRAGMA database_list"))


def _driver_of(connection: Connection) -> Any:  # of SQLite or PostgreSQL, by whatever package
    return connection.connection.driver_connection
