"""Owns the lease of this process, and the thread that renews it.

Knows nothing of deliveries and of the bus.

A lease belongs to a process, not to a row: each leased row names a process as its owner. The table
of processes has one row for each process, with the time until which it is alive, by the database's
clock. A heartbeat renews this time. Heartbeats come from a thread, so blocked event loops do not
stop them.

The process checks its own lease by its own clock. It counts from the moment before the renewing
statement, so the lease ends in this process before it ends in the table.

| lease | `is_valid` | `steady` | next |
|---|---|---|---|
| none, or over | no | no | a heartbeat, or a commit with a heartbeat: valid |
| valid | yes | no | no renewal within `seconds`: over. Valid for `seconds` in a row: steady |
| steady | yes | yes | no renewal within `seconds`: over |
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Collection
from threading import Event, Thread, current_thread
from typing import NamedTuple, Protocol
from uuid import UUID

from sqlalchemy import Connection

from eventkit._core.locks import new_lock
from eventkit._core.log import log
from eventkit.outbox._database import Database

_JOIN_SECONDS = 2.0  # `stop` waits this long for a running heartbeat
_SILENT_SECONDS = 60.0  # between two log lines about a database that is away


class Store(Protocol):
    """The statements that a heartbeat needs."""

    def beat(self, connection: Connection, owner: str, lease_seconds: float) -> object:
        """Write that the owner is alive for `lease_seconds` from now on."""
        ...

    def owned(self, connection: Connection, owner: str) -> set[UUID]:
        """Return the ids of the rows that the owner has leased."""
        ...

    def give_back(self, connection: Connection, owner: str, ids: Collection[UUID]) -> int:
        """Make these rows ready again, if the owner has leased them; return their number."""
        ...


def local_clock() -> float:
    """Return monotonic seconds. On Linux they also count while the machine is suspended."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()  # pragma: no cover - Linux has CLOCK_BOOTTIME


class _Times(NamedTuple):
    """The times of a lease. Replaced and never changed, so that readers need no lock."""

    began: float  # valid since this time without a break
    until: float
    term: object  # a new object after each break


class _Process:
    """The state of one process. A forked child makes its own."""

    def __init__(self) -> None:
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.times = _Times(0.0, 0.0, object())
        self.stops = 0  # the number of calls of `stop`
        self.beating = threading.Lock()
        # Leased rows that this process does not know, and when each was first seen so. The lock
        # `beating` guards it.
        self.unknown: dict[UUID, float] = {}
        self.warned: float | None = None  # the time of the last warning; used by the thread only
        self.thread: Thread | None = None
        self.over: Event | None = None
        self._lock = new_lock()

    def renew(self, now: float, until: float, stops: int | None = None) -> None:
        """Extend the lease. Do nothing if `stop` has been called more often than `stops`."""
        with self._lock:
            if stops is None or stops == self.stops:
                began, ended, term = self.times
                if now >= ended:
                    began = now  # there was a break
                    if ended:  # the lease was valid before the break
                        term = object()
                self.times = _Times(began, max(ended, until), term)

    def forget(self) -> None:
        """End the lease."""
        with self._lock:
            self.stops += 1
            self.times = _Times(0.0, 0.0, object())

    def stop(self) -> None:
        thread, self.thread = self.thread, None
        if thread is not None and self.over is not None:
            self.over.set()
            if current_thread() is not thread:  # a finalizer may run in this very thread
                thread.join(_JOIN_SECONDS)
        self.forget()


class Lease:
    """The lease of this process. Thread-safe.

    The thread has only a weak reference to the lease. It ends when the lease is garbage-collected.

    Attributes:
        seconds: The length of the lease, from each heartbeat.
        given_back: The number of rows that were given back because this process did not know them.
    """

    def __init__(
        self,
        database: Database,
        store: Store,
        seconds: float,
        alive: Callable[[], Collection[UUID]],
        *,
        clock: Callable[[], float] = local_clock,
        event: Callable[[], Event] = Event,
    ) -> None:
        """Starts no thread yet.

        Args:
            database: Heartbeats use its reserved connection.
            store: The statements.
            seconds: The length of the lease.
            alive: Returns the ids of the rows that this process has. Called in the lease's thread,
                or in the outbox's thread for an `AsyncEngine`.
            clock: Returns seconds. The clock must go on while the process is stopped.
            event: Makes the `Event` on which the thread waits.
        """
        self.seconds: float = seconds
        self.given_back: int = 0
        self._database = database
        self._store = store
        self._alive = alive
        self._clock = clock
        self._event = event
        self._lock = new_lock()
        # By process id. A forked child keeps the entry of its parent.
        self._processes: dict[int, _Process] = {}
        weakref.finalize(self, _stop, self._processes)

    @property
    def owner(self) -> str:
        """The name of this process in rows: `host:pid:random`. A forked child has a new one."""
        return self._process().owner

    @property
    def is_valid(self) -> bool:
        """Whether the lease is valid, by the local clock. Then no process may reap this one."""
        process = self._processes.get(os.getpid())
        return process is not None and self.now() < process.times.until

    @property
    def term(self) -> object | None:
        """An object that is the same while the lease is valid without a break; None if not valid.

        After a break, another process may have taken over the rows that were leased before it.
        """
        process = self._processes.get(os.getpid())
        if process is None:
            return None
        _, until, term = process.times
        return term if self.now() < until else None

    @property
    def steady(self) -> bool:
        """Whether the lease has been valid for `seconds` without a break.

        This process may treat others as dead only if this is True. After an outage of the database,
        all living processes have renewed their leases within these seconds.
        """
        process = self._processes.get(os.getpid())
        if process is None:
            return False
        began, until, _ = process.times
        return began + self.seconds <= self.now() < until

    def now(self) -> float:
        """The local clock, in seconds."""
        return self._clock()

    def start(self, *, at_once: bool = True) -> None:
        """Start the thread that sends heartbeats. Does not wait for the first heartbeat.

        Does nothing if the thread runs. After `stop` a new thread starts.

        Args:
            at_once: Whether to send the first heartbeat now. If False, it is sent after a third of
                the lease, because another transaction is about to renew the lease. Two at the same
                time would conflict if that transaction is REPEATABLE READ.
        """
        process = self._process()
        with self._lock:
            if process.thread is None:
                process.over = self._event()
                process.thread = Thread(
                    target=_keep,
                    args=[weakref.ref(self), process.over, 0.0 if at_once else self.seconds / 3],
                    name="eventkit-lease",
                    daemon=True,
                )
                process.thread.start()

    def stop(self) -> None:
        """End the thread, and the lease in this process. The lease is not valid until a renewal.

        Waits for a running heartbeat, at most two seconds. The row in the table is not changed.
        """
        _stop(self._processes)

    def beat(self) -> None:
        """Send one heartbeat, and give back leased rows that this process does not know. Blocks.

        A row is given back if it is unknown in two heartbeats, at least a third of a lease apart.
        In the first one, the result of the claim may not have reached its task yet.

        Raises:
            Exception: The database is away. The lease is not changed.
        """
        process = self._process()
        with process.beating:
            since, stops = self.now(), process.stops

            def renew(connection: Connection) -> tuple[dict[UUID, float], int]:
                self._store.beat(connection, process.owner, self.seconds)
                return self._reconcile(connection, process)

            unknown, count = self._database.call(renew, reserved=True)
            process.unknown = unknown
            # Not after `stop`: its caller may have deleted the row of this process.
            process.renew(self.now(), since + self.seconds, stops)
        if count:
            self.given_back += count
            log(
                logging.INFO,
                "deliveries that this process does not know were given back to the table",
                deliveries=count,
                owner=process.owner,
            )

    def extend(self, since: float) -> None:
        """Extend the lease after the commit of another transaction that has sent a heartbeat.

        Args:
            since: The local time before the statement.
        """
        self._process().renew(self.now(), since + self.seconds)

    def take_turn(self) -> float:
        """Send a heartbeat in the thread, and log an error; return the seconds until the next."""
        try:
            self.beat()
        except Exception as error:  # noqa: BLE001 - of the driver; the thread goes on
            self._warn(error)
            return self.seconds / 10
        return self.seconds / 3

    def _process(self) -> _Process:
        pid = os.getpid()
        process = self._processes.get(pid)
        if process is None:  # `setdefault` is atomic, so all threads get the same one
            process = self._processes.setdefault(pid, _Process())
        return process

    def _reconcile(
        self, connection: Connection, process: _Process
    ) -> tuple[dict[UUID, float], int]:
        """Give back unknown rows; return those that are still unknown, and how many went back."""
        owned = self._store.owned(connection, process.owner)
        look = self.now()
        # `alive` has to be called after `owned`: a process knows its rows before they are leased.
        lost = owned.difference(self._alive())
        unknown = {each: process.unknown.get(each, look) for each in lost}
        twice = [each for each, first in unknown.items() if look - first >= self.seconds / 3]
        count = self._store.give_back(connection, process.owner, twice) if twice else 0
        for each in twice:
            del unknown[each]
        return unknown, count

    def _warn(self, error: Exception) -> None:
        process, now = self._process(), self.now()
        if process.warned is not None and now - process.warned < _SILENT_SECONDS:
            return
        if not threading.main_thread().is_alive():  # the driver fails while the interpreter ends
            return
        process.warned = now
        log(
            logging.WARNING,
            "the lease of this process cannot be renewed, and is tried again: without a lease no "
            "durable delivery starts here",
            owner=process.owner,
            error=error,
        )


def _keep(lease: weakref.ref[Lease], over: Event, pause: float) -> None:
    if pause and over.wait(pause):
        return
    while not over.is_set() and (alive := lease()) is not None:  # pragma: no branch - it waits
        pause = alive.take_turn()
        del alive
        if over.wait(pause):
            return


def _stop(processes: dict[int, _Process]) -> None:
    process = processes.get(os.getpid())
    if process is not None:
        process.stop()
