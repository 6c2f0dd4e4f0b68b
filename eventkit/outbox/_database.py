"""Owns the outbox's connections: the twin of the user's engine, and who waits for it where.

Knows nothing of tables, deliveries and leases: it opens a transaction, calls a function with the
connection, and commits.

The twin connects as the user's engine does, and shares no connection with it. An outbox that took
its connections from the pool of the requests would wait for them under load, and for ever where
that pool has one. A blocking engine is used in the caller's thread or in a worker thread. An
`AsyncEngine` belongs to one event loop, so a thread with a loop of its own uses its twin: that
works while the loops of the application are blocked, and needs no second driver.
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
_LAST_PATIENCE = 2.0  # seconds, where nobody has closed it before the process or it ends
_OLDEST = {"postgresql": (12,), "sqlite": (3, 35)}
_WHICH = "the outbox needs PostgreSQL 12, SQLite 3.35, or a newer one of these"
# What is noted of a connection, as long as it is open.
_BUSY_TIMEOUT_IS_SET = "eventkit_busy_timeout_is_set"
_IS_READ_COMMITTED = "eventkit_is_read_committed"


class Database:
    """Transactions on connections of the outbox's own: at most three at once in a process.

    Two are for `call` and `run`, and one is reserved. Where the pool has room for fewer, they take
    turns. All methods may be called in any thread. A forked child opens connections of its own,
    and never touches, closes or frees those of its parent. On SQLite do not fork while any
    transaction is open: the child has a copy of the library's locks, which nobody ever releases.

    Attributes:
        dialect: That of the engine whose connections they are.
    """

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        own: Engine | AsyncEngine | None = None,
        *,
        busy_timeout: float = 5.0,
    ) -> None:
        """Connects to nothing yet, so that events of the engine may still be listened to.

        Args:
            engine: That whose transactions the outbox writes in. Its twin has the same dialect,
                pool class and pool events; its options are not applied. On PostgreSQL the twin
                runs READ COMMITTED, whatever isolation level the engine or the server has.
            own: Used as it is, instead of a twin. Nobody else should use its connections: those of
                an `AsyncEngine` are used on the outbox's event loop, and `close` disposes of it.
            busy_timeout: Seconds that a transaction waits for SQLite's lock at least.

        Raises:
            ValueError: An engine commits each statement, or is of another database.
        """
        for each in [engine] if own is None else [engine, own]:
            _refuse(each)
        chosen = engine if own is None else own
        self.dialect: Dialect = chosen.dialect
        self._engine, self._own = engine, own
        self._url = chosen.url
        self._busy_timeout = round(busy_timeout * 1000)  # milliseconds
        self._is_in_memory: bool | None = None
        self._has_looked = False  # whether the version and the driver's mode are known to be right
        self._lock = new_lock()
        # By process: what a parent has opened stays here, so that nothing frees it in the child.
        self._links: dict[int, _Blocking | _Awaiting] = {}
        # A limiter belongs to the loop it is used in.
        self._limiter: RunVar[CapacityLimiter] = RunVar("eventkit_outbox_threads")
        weakref.finalize(self, _close, self._links, _LAST_PATIENCE)

    @property
    def awaits(self) -> bool:
        """Whether its connections are those of an `AsyncEngine`."""
        return isinstance(self._engine if self._own is None else self._own, AsyncEngine)

    @property
    def address(self) -> str:
        """The engine's URL as people may see it: without its password, and without its query."""
        return self._url.set(query={}).render_as_string(hide_password=True)

    @property
    def is_in_memory(self) -> bool:
        """Whether it is SQLite without a file: then each connection may be a database of its own.

        The URL says that there is a file. Where it does not, the database is asked once, because
        `create_engine(creator=...)` may open a file that the URL does not name.
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
        """Call it in a transaction, commit, and give what it returned. Blocks the thread.

        Args:
            function: Called with a connection on which a transaction is open. With an
                `AsyncEngine` it runs in the outbox's thread, so it must not block.
            writes: Whether it may write. On SQLite such a transaction takes the lock as it
                begins: to take it later fails where another one has written meanwhile.
            reserved: Take the connection that is reserved. For the lease, which must not wait.

        Raises:
            BaseException: What the function raised, after a rollback; what the database raised.
            ValueError: The server, or SQLite's library, is too old.
        """
        return self._link().call(partial(self._transact, function, writes), reserved)

    async def run(self, function: _Work[_Result], *, writes: bool = True) -> _Result:
        """As `call`, and the event loop does not wait. At most two run at once in a process.

        A cancellation of the caller comes through at once, and cancels no transaction half-way:
        one that has not begun never does, and one that has is carried on to its end by itself.
        What it returns or raises is dropped then, so it may have been committed or not.

        Raises:
            RuntimeError: It is an `AsyncEngine`, and trio calls.
        """
        work = partial(self._transact, function, writes)
        link = self._link()
        if isinstance(link, _Blocking):
            return await link.run(work, self._threads())
        if on_trio():
            raise RuntimeError(
                f"{link.engine!r} has asyncio's driver; on trio use a blocking engine"
            )
        return await asyncio.wrap_future(link.submit(work, reserved=False))

    def close(self) -> None:
        """End the thread and the connections; the next call opens them anew.

        Waits for the transactions that are open, for five seconds at most. Those that an
        `AsyncEngine` has open after that are cancelled: their callers get a `RuntimeError`.
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
            if self._links:  # a parent's
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
        """Begin by a statement: the driver would do it at the first write, or not at all."""
        if _BUSY_TIMEOUT_IS_SET not in connection.info:
            timeout = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
            if timeout < self._busy_timeout:
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {self._busy_timeout}")
            connection.info[_BUSY_TIMEOUT_IS_SET] = True
        # A listener of all engines may have begun one, and `autocommit=False` always has.
        if not _driver_of(connection).in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class _Blocking:
    """An engine that blocks the thread which uses it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pool = engine.pool  # a child must not free the connections of its parent
        ordinary, reserved = _turns(engine.pool)
        self._ordinary = Semaphore(ordinary)
        self._reserved = Semaphore(reserved) if reserved else self._ordinary
        self._count = ordinary, reserved
        # It keeps a connection for each thread, and worker threads come and go.
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
            del ticket  # what it raised keeps this frame, and the ticket keeps what it raised

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
    """An engine that is awaited, in a thread that begins when it is needed."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._pool = engine.pool  # a child must not free the connections of its parent
        self._lock = new_lock()
        self._thread: _LoopThread | None = None

    def call(self, work: _Work[_Result], reserved: bool) -> _Result:
        return self.submit(work, reserved).result()

    def submit(self, work: _Work[_Result], reserved: bool) -> Future[_Result]:
        """Have it done; a ticket that is cancelled is not begun any more."""
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
    """One that is closed in a forked child.

    Else finalizers of asyncpg's end its connections as the child exits: they send the server a
    farewell, on sockets that are its parent's too. Windows has another loop by default, on which
    psycopg does not work.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()

    def is_closed(self) -> bool:
        return super().is_closed() or self._pid != os.getpid()


class _LoopThread:
    """A thread with an event loop, which alone uses the engine's connections."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        ordinary, reserved = _turns(engine.pool)
        self._ordinary = asyncio.Semaphore(ordinary)
        self._reserved = asyncio.Semaphore(reserved) if reserved else self._ordinary
        self._tasks: set[asyncio.Task[None]] = set()  # changed on the loop alone
        self._loop = _Loop()
        self._thread = Thread(target=_serve, args=[self._loop], name="eventkit-outbox", daemon=True)
        self._thread.start()

    def post(self, ticket: Future[_Result], work: _Work[_Result], reserved: bool) -> None:
        # Connections outlive the request that opened them, so they get none of its variables.
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
                ticket.set_exception(RuntimeError("the outbox's connections were closed meanwhile"))
        except BaseException as error:  # noqa: BLE001 - raised where the ticket is waited for
            ticket.set_exception(error)
        else:
            ticket.set_result(result)

    def end(self, patience: float) -> None:
        self._loop.call_soon_threadsafe(self._end_soon, patience, context=Context())
        if current_thread() is not self._thread:  # else the collector has called, in the midst
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
    """Wait for what may hang or fail where the server is away: there is nothing left to do then."""
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
            f"{_WHICH}, and {engine!r} is none: use deliver_on_commit, which works with others, too"
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
    """Whether it is known to be new enough, and to have transactions.

    Raises:
        ValueError: It is not so.
    """
    dialect = connection.dialect
    if getattr(_driver_of(connection), "autocommit", None) is True:  # set by the driver's own means
        raise _autocommit(connection.engine)
    version = dialect.server_version_info
    if version is None:  # the user's engine connects for the first time just now, and asks
        return False
    if version < _OLDEST[dialect.name]:
        found = ".".join(map(str, version))
        raise ValueError(f"{_WHICH}, and this is {found}: use deliver_on_commit")
    return True


def _isolation_level(dialect: Dialect) -> str | None:
    """The one that `create_engine` was given, which can be had nowhere else."""
    return _spelled(getattr(dialect, "_on_connect_isolation_level", None))


def _spelled(level: str | None) -> str | None:
    """A level that users may write in lower case and with underscores."""
    return None if level is None else level.upper().replace("_", " ")


def _twin_of(engine: Engine | AsyncEngine) -> Engine | AsyncEngine:
    """An engine that connects as the other one does, and has none of its connections.

    The new pool has copies of the other one's listeners. None is added to it, and none that the
    user adds later reaches it.
    """
    root = root_of(engine)
    twin = Engine(
        root.pool.recreate(), root.dialect, root.url, hide_parameters=root.hide_parameters
    )
    return AsyncEngine(twin) if isinstance(engine, AsyncEngine) else twin


def _read_committed(connection: Connection) -> None:
    """Set it once for each connection: the engine's option would be set and reset each time."""
    driver = connection.connection.dbapi_connection
    if driver is not None and _IS_READ_COMMITTED not in connection.info:
        connection.dialect.set_isolation_level(driver, "READ COMMITTED")
        connection.info[_IS_READ_COMMITTED] = True


def _turns(pool: Pool) -> tuple[int, int]:
    """How many may use the pool at once: on ordinary connections, and on the reserved one.

    They wait here and not in the pool, whose timeout is made for requests.
    """
    room = _ORDINARY + _RESERVED
    if isinstance(pool, StaticPool | AssertionPool | SingletonThreadPool):
        room = 1  # the last one closes connections of other threads when it has too many
    elif isinstance(pool, QueuePool) and pool.size() > 0:
        overflow = pool._max_overflow  # noqa: SLF001 - it can be had nowhere else
        room = room if overflow < 0 else min(room, pool.size() + overflow)
    return (1, 0) if room == 1 else (room - _RESERVED, _RESERVED)


def _opens_a_file(connection: Connection) -> bool:
    # For each database its number, its name, and its file or nothing.
    return any(file for _, _, file in connection.exec_driver_sql("PRAGMA database_list"))


def _driver_of(connection: Connection) -> Any:  # of SQLite or PostgreSQL, by whatever package
    return connection.connection.driver_connection
