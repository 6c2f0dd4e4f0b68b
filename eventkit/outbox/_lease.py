"""Owns who this process is, until when it is alive, and the thread that keeps it so.

Rows name their owner, which is a process and not a row's own lease. One row of each process says
until when it is alive by the database's clock; the thread renews it while event loops are blocked.
The process judges its own lease by its own clock, counted from before the renewing statement, so
its lease ends here before it ends there. Knows nothing of deliveries and of the bus.

| lease | `is_valid` | `steady` | left by |
|---|---|---|---|
| none, or over | no | no | a heartbeat, or a commit that carried one: valid |
| valid | yes | no | no renewal for a lease: over. One lease in a row: steady |
| steady | yes | yes | no renewal for a lease: over |
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

_JOIN_SECONDS = 2.0  # that `stop` waits for a heartbeat on its way
_SILENT_SECONDS = 60.0  # between two lines about a database that is away


class Store(Protocol):
    """The statements that a heartbeat needs."""

    def beat(self, connection: Connection, owner: str, lease_seconds: float) -> object:
        """Write that the owner is alive for this long from now on."""
        ...

    def owned(self, connection: Connection, owner: str) -> set[UUID]:
        """The rows that are leased to the owner."""
        ...

    def give_back(self, connection: Connection, owner: str, ids: Collection[UUID]) -> int:
        """Let others have those of these rows that are leased to the owner; give how many."""
        ...


def local_clock() -> float:
    """Seconds that go on while the machine is suspended, where the system counts those."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()  # pragma: no cover - on Linux there is the other one


class _Times(NamedTuple):
    """Replaced and never changed, so that readers need no lock."""

    began: float  # valid since then without a break
    until: float
    term: object  # another one after each break


class _Process:
    """What belongs to one process alone: a forked child makes one of its own."""

    def __init__(self) -> None:
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.times = _Times(0.0, 0.0, object())
        self.stops = 0  # how often `stop` was called
        self.beating = threading.Lock()
        self.unknown: dict[UUID, float] = {}  # when it was first seen so; under `beating`
        self.warned: float | None = None  # when; the thread's own
        self.thread: Thread | None = None
        self.over: Event | None = None
        self._lock = new_lock()

    def renew(self, now: float, until: float, stops: int | None = None) -> None:
        """Have the lease end then, unless `stop` was called since it was called this often."""
        with self._lock:
            if stops is None or stops == self.stops:
                began, ended, term = self.times
                if now >= ended:
                    began = now  # known only since now
                    if ended:  # it was valid before
                        term = object()
                self.times = _Times(began, max(ended, until), term)

    def forget(self) -> None:
        """The lease is over."""
        with self._lock:
            self.stops += 1
            self.times = _Times(0.0, 0.0, object())

    def stop(self) -> None:
        thread, self.thread = self.thread, None
        if thread is not None and self.over is not None:
            self.over.set()
            if current_thread() is not thread:  # else the collector has called, in the midst
                thread.join(_JOIN_SECONDS)
        self.forget()


class Lease:
    """The lease of this process. All of it may be used in any thread.

    The thread knows it weakly: a lease that is garbage ends its thread.

    Attributes:
        seconds: How long each heartbeat makes it valid.
        given_back: How many rows were given back because nobody here knew them.
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
        """Begins nothing.

        Args:
            database: Where heartbeats are written, on its reserved connection.
            store: The statements.
            seconds: The length of the lease.
            alive: The ids of the rows that this process knows of. Called in the lease's thread, or
                in that of an `AsyncEngine`.
            clock: Seconds; it must go on while the process is stopped.
            event: Makes what the thread waits on.
        """
        self.seconds: float = seconds
        self.given_back: int = 0
        self._database = database
        self._store = store
        self._alive = alive
        self._clock = clock
        self._event = event
        self._lock = new_lock()
        self._processes: dict[int, _Process] = {}  # by their ids; that of a parent stays
        weakref.finalize(self, _stop, self._processes)

    @property
    def owner(self) -> str:
        """What rows call this process: `host:pid:random`, another one after a fork."""
        return self._process().owner

    @property
    def is_valid(self) -> bool:
        """Whether nobody may take this process for dead, by the local clock."""
        process = self._processes.get(os.getpid())
        return process is not None and self.now() < process.times.until

    @property
    def term(self) -> object | None:
        """What the lease is, as long as it is valid without a break; None if it is not valid.

        What was leased in another term may have been given to another process meanwhile.
        """
        process = self._processes.get(os.getpid())
        if process is None:
            return None
        _, until, term = process.times
        return term if self.now() < until else None

    @property
    def steady(self) -> bool:
        """Whether it has been valid without a break for one whole lease.

        Only then may it say that others are dead: after an outage of the database all that live
        have renewed theirs by then.
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
        """Have a thread send heartbeats from now on, without waiting for the first one.

        With `at_once` that is sent now, else in a third of the lease, for another transaction is
        about to carry one: where that is REPEATABLE READ, two at a time are one too many.

        Does nothing where this process has one. After `stop` another one begins.
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
        """End the thread, and the lease here: it is not valid until it is renewed.

        Waits for a heartbeat on its way, for two seconds at most. In the table the lease goes on
        until it lapses or its row is deleted.
        """
        _stop(self._processes)

    def beat(self) -> None:
        """Send one heartbeat, and give back what nobody here knows. Blocks the thread.

        A row is given back where it was unknown at two looks, a third of a lease apart: it may be
        on its way from the database to whoever claimed it.

        Raises:
            Exception: The database is away. The lease is as it was.
        """
        process = self._process()
        with process.beating:
            since, stops = self.now(), process.stops

            def renew(connection: Connection) -> tuple[dict[UUID, float], int]:
                self._store.beat(connection, process.owner, self.seconds)
                return self._reconcile(connection, process)

            unknown, count = self._database.call(renew, reserved=True)
            process.unknown = unknown
            # Not after `stop`: its caller may have deleted the row that was written.
            process.renew(self.now(), since + self.seconds, stops)
        if count:
            self.given_back += count
            log(
                logging.INFO,
                "deliveries that nobody here waits for were given back to the table",
                deliveries=count,
                owner=process.owner,
            )

    def extend(self, since: float) -> None:
        """Count a heartbeat that another transaction has carried, and that is committed.

        Args:
            since: The local clock before the statement.
        """
        self._process().renew(self.now(), since + self.seconds)

    def take_turn(self) -> float:
        """Send a heartbeat for the thread; log what fails. Give the seconds until the next one."""
        try:
            self.beat()
        except Exception as error:  # noqa: BLE001 - of the driver; the thread goes on
            self._warn(error)
            return self.seconds / 10
        return self.seconds / 3

    def _process(self) -> _Process:
        pid = os.getpid()
        process = self._processes.get(pid)
        if process is None:  # of several threads one has its way, in one step
            process = self._processes.setdefault(pid, _Process())
        return process

    def _reconcile(
        self, connection: Connection, process: _Process
    ) -> tuple[dict[UUID, float], int]:
        """Give what is unknown after this look, and how many were given back."""
        owned = self._store.owned(connection, process.owner)
        look = self.now()
        lost = owned.difference(
            self._alive()
        )  # asked after the table: what it has was known before
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
        if not threading.main_thread().is_alive():  # the interpreter ends, and the driver with it
            return
        process.warned = now
        log(
            logging.WARNING,
            "the lease of this process cannot be renewed, and is tried again: without it no "
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
