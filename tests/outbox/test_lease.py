"""The lease of a process: its times, its thread, and what it gives back."""

import gc
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from queue import Queue
from uuid import UUID, uuid4

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from sqlalchemy import Connection

from eventkit.outbox._database import Database
from eventkit.outbox._lease import Lease, local_clock
from tests.outbox.engines import KINDS, Place, place_of, processed_apart

SECONDS = 20.0  # that a test waits for another thread before it fails
LEASE = 15.0


class Store:
    """The statements of a heartbeat, on a table of owners and rows; it can be told to fail."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.errors: list[Exception] = []  # each for one heartbeat
        self.meanwhile: Callable[[], None] = lambda: None
        self.beats: list[tuple[str, float]] = []
        self.given_back: list[set[UUID]] = []

    def beat(self, connection: Connection, owner: str, lease_seconds: float) -> None:
        self.meanwhile()
        if self.errors:
            raise self.errors.pop(0)
        self.beats.append((owner, lease_seconds))
        self.place.insert(f"beat {owner}")(connection)

    def owned(self, connection: Connection, owner: str) -> set[UUID]:
        names = self.place.names(connection)
        return {UUID(name[-36:]) for name in names if name.startswith(f"row {owner} ")}

    def give_back(self, connection: Connection, owner: str, ids: Collection[UUID]) -> int:
        self.given_back.append({*ids})
        for each in ids:
            connection.exec_driver_sql(
                f"DELETE FROM {self.place.table} WHERE name = 'row {owner} {each}'"
            )
        return len(ids)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Steps(threading.Event):
    """Has a thread wait for a test instead of for the time."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: Queue[float] = Queue()
        self._go: Queue[bool] = Queue()

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.pauses.put(timeout)
        return self._go.get() or self.is_set()

    def go_on(self) -> None:
        self._go.put(False)

    def set(self) -> None:
        super().set()
        self._go.put(True)


@pytest.fixture(params=KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, service_url: Callable[[str], str]
) -> Iterator[Place]:
    """A database reached by each driver."""
    with place_of(request.param, tmp_path, service_url) as place:
        yield place


@pytest.fixture
def one_place(tmp_path: Path, service_url: Callable[[str], str]) -> Iterator[Place]:
    """A database, where the driver does not matter."""
    with place_of("pysqlite", tmp_path, service_url) as place:
        yield place


class Wired:
    """A lease with all that it works with."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.database = Database(place.engine())
        self.store = Store(place)
        self.clock = Clock()
        self.alive: set[UUID] = set()
        self.steps = Steps()
        self.lease = self.make()

    def make(self) -> Lease:
        alive, steps = self.alive, self.steps
        return Lease(
            self.database, self.store, LEASE, lambda: alive, clock=self.clock, event=lambda: steps
        )

    def add_row(self) -> UUID:
        row = uuid4()
        self.database.call(self.place.insert(f"row {self.lease.owner} {row}"))
        return row

    def beat_later(self, seconds: float) -> None:
        self.clock.seconds += seconds
        self.lease.beat()

    def close(self) -> None:
        self.lease.stop()
        self.database.close()


@pytest.fixture
def wired(one_place: Place) -> Iterator[Wired]:
    wired = Wired(one_place)
    yield wired
    wired.close()


@pytest.fixture
def anywhere(place: Place) -> Iterator[Wired]:
    """A lease on each kind of database."""
    wired = Wired(place)
    yield wired
    wired.close()


def lease_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "eventkit-lease"]


# Its times


def test_a_lease_is_not_valid_before_the_first_heartbeat(wired: Wired) -> None:
    assert not wired.lease.is_valid
    assert not wired.lease.steady


def test_a_heartbeat_makes_it_valid_for_the_length_of_the_lease(anywhere: Wired) -> None:
    lease, clock = anywhere.lease, anywhere.clock
    lease.beat()

    assert anywhere.store.beats == [(lease.owner, LEASE)]
    clock.seconds += LEASE - 0.1
    assert lease.is_valid
    clock.seconds += 0.1
    assert not lease.is_valid
    assert anywhere.database.call(anywhere.place.names) == [f"beat {lease.owner}"]


def test_it_is_counted_from_before_the_statement(wired: Wired) -> None:
    def take_long() -> None:
        wired.clock.seconds += 10

    wired.store.meanwhile = take_long
    wired.lease.beat()

    wired.clock.seconds += 4.9
    assert wired.lease.is_valid
    wired.clock.seconds += 0.1
    assert not wired.lease.is_valid


def test_a_heartbeat_that_took_longer_than_the_lease_makes_nothing_valid(wired: Wired) -> None:
    def stop_process() -> None:
        wired.clock.seconds += LEASE

    wired.store.meanwhile = stop_process
    wired.lease.beat()
    assert not wired.lease.is_valid

    wired.store.meanwhile = lambda: None
    wired.lease.beat()
    assert wired.lease.is_valid


def test_it_is_steady_after_one_lease_without_a_break(wired: Wired) -> None:
    wired.lease.beat()
    for _ in range(2):
        wired.beat_later(LEASE / 3)
        assert not wired.lease.steady
    wired.beat_later(LEASE / 3)

    assert wired.lease.steady


def test_a_process_that_was_stopped_for_longer_begins_anew(wired: Wired) -> None:
    wired.lease.beat()
    for _ in range(3):
        wired.beat_later(LEASE / 3)
    assert wired.lease.steady

    wired.clock.seconds += LEASE
    assert not wired.lease.is_valid
    assert not wired.lease.steady
    wired.lease.beat()
    assert wired.lease.is_valid
    assert not wired.lease.steady
    for _ in range(3):
        wired.beat_later(LEASE / 3)
    assert wired.lease.steady


def test_a_break_ends_the_term_in_which_rows_were_leased(wired: Wired) -> None:
    assert wired.lease.term is None
    wired.lease.beat()
    first = wired.lease.term
    assert first is not None
    wired.beat_later(LEASE / 3)
    assert wired.lease.term is first

    wired.clock.seconds += LEASE
    assert wired.lease.term is None
    wired.lease.extend(wired.clock.seconds)
    second = wired.lease.term
    assert second not in (None, first)

    wired.lease.stop()
    wired.lease.beat()
    assert wired.lease.term not in (None, first, second)


def test_a_lease_that_lapsed_during_the_statement_is_not_without_a_break(wired: Wired) -> None:
    def take_long() -> None:
        wired.clock.seconds += LEASE - 1

    wired.lease.beat()
    wired.clock.seconds += 2
    wired.store.meanwhile = take_long
    wired.lease.beat()
    wired.store.meanwhile = lambda: None

    assert wired.lease.is_valid
    wired.lease.extend(wired.clock.seconds)
    wired.clock.seconds += LEASE - 0.1
    assert not wired.lease.steady


def test_a_commit_that_carried_a_heartbeat_extends_it(wired: Wired) -> None:
    since = wired.lease.now()
    wired.clock.seconds += 4
    wired.lease.extend(since)

    assert wired.lease.is_valid
    wired.clock.seconds += LEASE - 4
    assert not wired.lease.is_valid


def test_an_older_heartbeat_does_not_make_it_shorter(wired: Wired) -> None:
    wired.lease.beat()
    wired.lease.extend(wired.lease.now() - 10)
    wired.clock.seconds += LEASE - 0.1

    assert wired.lease.is_valid


def test_a_heartbeat_that_fails_leaves_the_lease_as_it_was(anywhere: Wired) -> None:
    anywhere.lease.beat()
    anywhere.store.errors.append(OSError("away"))
    anywhere.clock.seconds += LEASE / 3

    with pytest.raises(OSError, match="away"):
        anywhere.lease.beat()

    assert anywhere.lease.is_valid
    anywhere.clock.seconds += LEASE * 2 / 3
    assert not anywhere.lease.is_valid


def test_the_owner_names_the_process(wired: Wired) -> None:
    owner = wired.lease.owner

    assert owner.split(":")[-2] == str(os.getpid())
    assert wired.lease.owner == owner
    assert wired.make().owner != owner


def test_the_clock_goes_on() -> None:
    before = local_clock()

    assert before <= local_clock()


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="this system has no such clock")
def test_the_clock_counts_the_time_that_the_machine_sleeps() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)

    assert before <= local_clock() <= time.clock_gettime(time.CLOCK_BOOTTIME)


# What it gives back


def test_a_row_that_nobody_knows_is_given_back_at_the_second_look(
    anywhere: Wired, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    known, unknown = anywhere.add_row(), anywhere.add_row()
    anywhere.alive.add(known)

    anywhere.lease.beat()
    assert anywhere.store.given_back == []
    anywhere.beat_later(LEASE / 3)

    assert anywhere.store.given_back == [{unknown}]
    assert anywhere.lease.given_back == 1
    anywhere.beat_later(LEASE / 3)
    assert anywhere.store.given_back == [{unknown}]
    (line,) = [record for record in caplog.records if record.name == "eventkit"]
    assert line.levelno == logging.INFO
    assert "deliveries=1" in line.getMessage()


def test_two_looks_that_are_close_together_count_as_one(wired: Wired) -> None:
    wired.add_row()
    wired.lease.beat()
    for _ in range(3):
        wired.beat_later(LEASE / 10)
    assert wired.store.given_back == []
    wired.beat_later(LEASE / 10)

    assert wired.lease.given_back == 1


def test_a_row_that_becomes_known_after_the_first_look_is_kept(wired: Wired) -> None:
    row = wired.add_row()
    wired.lease.beat()
    wired.alive.add(row)
    wired.beat_later(LEASE / 3)
    wired.alive.discard(row)
    wired.beat_later(LEASE / 3)
    assert wired.store.given_back == []
    wired.beat_later(LEASE / 3)

    assert wired.store.given_back == [{row}]


def test_what_is_known_is_asked_after_the_table(wired: Wired) -> None:
    """Else a row that is claimed between the two questions looks lost."""
    row = wired.add_row()
    owned = wired.store.owned

    def meanwhile(connection: Connection, owner: str) -> set[UUID]:
        found = owned(connection, owner)
        wired.alive.add(row)
        return found

    wired.lease.beat()
    wired.store.owned = meanwhile  # type: ignore[method-assign]
    wired.beat_later(LEASE / 3)

    assert wired.store.given_back == []


def test_a_look_whose_transaction_failed_does_not_count(wired: Wired) -> None:
    wired.add_row()
    wired.lease.beat()
    wired.store.errors.append(OSError())
    wired.clock.seconds += LEASE / 3
    with pytest.raises(OSError):  # noqa: PT011 - it has no text
        wired.lease.beat()

    wired.beat_later(0)
    assert wired.lease.given_back == 1


# Its thread


def test_the_thread_sends_heartbeats_and_tries_failed_ones_sooner(anywhere: Wired) -> None:
    steps, store = anywhere.steps, anywhere.store
    anywhere.lease.start()
    anywhere.lease.start()

    assert steps.pauses.get(timeout=SECONDS) == LEASE / 3
    assert len(lease_threads()) == len(store.beats) == 1
    store.errors.append(OSError("away"))
    steps.go_on()
    assert steps.pauses.get(timeout=SECONDS) == LEASE / 10
    steps.go_on()
    assert steps.pauses.get(timeout=SECONDS) == LEASE / 3
    assert len(store.beats) == 2
    assert all(thread.daemon for thread in lease_threads())


def test_its_first_heartbeat_may_be_left_to_a_transaction_that_carries_one(wired: Wired) -> None:
    """Two at a time fail the one that is REPEATABLE READ."""
    wired.lease.start(at_once=False)

    assert wired.steps.pauses.get(timeout=SECONDS) == LEASE / 3
    assert wired.store.beats == []
    wired.steps.go_on()
    assert wired.steps.pauses.get(timeout=SECONDS) == LEASE / 3
    assert len(wired.store.beats) == 1

    wired.lease.stop()
    wired.lease.start(at_once=False)
    wired.lease.stop()
    assert lease_threads() == []


def test_what_fails_is_warned_of_once_a_minute(
    wired: Wired, caplog: pytest.LogCaptureFixture
) -> None:
    wired.store.errors += [OSError(str(number)) for number in range(100)]
    for _ in range(100):
        assert wired.lease.take_turn() == LEASE / 10
        wired.clock.seconds += LEASE / 10

    errors = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [*map(str, errors)] == ["0", "40", "80"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert wired.lease.owner in caplog.text


def test_what_fails_as_the_interpreter_ends_is_not_told(
    wired: Wired, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired.store.errors.append(RuntimeError("cannot schedule new futures after shutdown"))
    ended = threading.Thread(target=print)
    monkeypatch.setattr(threading, "main_thread", lambda: ended)

    wired.lease.take_turn()

    assert not caplog.records


def test_stop_ends_the_thread_and_the_lease(anywhere: Wired) -> None:
    anywhere.lease.stop()
    anywhere.lease.start()
    anywhere.steps.pauses.get(timeout=SECONDS)
    (thread,) = lease_threads()

    anywhere.lease.stop()
    anywhere.lease.stop()

    assert not thread.is_alive()
    assert not anywhere.lease.is_valid


def test_it_may_be_started_again(wired: Wired) -> None:
    wired.lease.start()
    wired.steps.pauses.get(timeout=SECONDS)
    wired.lease.stop()
    owner, wired.steps = wired.lease.owner, Steps()
    wired.lease._event = lambda: wired.steps
    wired.lease.start()
    wired.steps.pauses.get(timeout=SECONDS)

    assert wired.lease.is_valid
    assert [each for each, _ in wired.store.beats] == [owner, owner]


def test_stop_does_not_wait_for_ever_for_a_heartbeat(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventkit.outbox._lease._JOIN_SECONDS", 0.01)
    begun, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        go_on.wait(SECONDS)

    wired.store.meanwhile = hang
    wired.lease.start()
    assert begun.wait(SECONDS)
    (thread,) = lease_threads()

    wired.lease.stop()
    assert thread.is_alive()
    go_on.set()
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_a_heartbeat_that_ends_after_stop_makes_nothing_valid(wired: Wired) -> None:
    wired.store.meanwhile = wired.lease._process().forget  # as `stop` in another thread
    wired.lease.beat()

    assert not wired.lease.is_valid


def test_a_lease_that_is_garbage_ends_its_thread(wired: Wired) -> None:
    wired.lease.start()
    wired.steps.pauses.get(timeout=SECONDS)
    (thread,) = lease_threads()
    gone = weakref.ref(wired.lease)

    del wired.lease
    gc.collect()
    thread.join(SECONDS)

    assert gone() is None
    assert not thread.is_alive()
    wired.lease = wired.make()


def test_a_lease_that_becomes_garbage_during_its_heartbeat_ends_its_thread(wired: Wired) -> None:
    """Then the thread itself frees it, and must not wait for itself."""
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go_on.wait(SECONDS)

    wired.store.meanwhile = hold
    wired.lease.start()
    assert begun.wait(SECONDS)
    (thread,) = lease_threads()

    del wired.lease
    go_on.set()
    thread.join(SECONDS)

    assert not thread.is_alive()
    wired.store.meanwhile = lambda: None
    wired.lease = wired.make()


# Its process

PRELUDE = """
import os, sys, time, threading
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from eventkit.outbox._database import Database
from eventkit.outbox._lease import Lease

class Store:
    beats = 0
    def beat(self, connection, owner, seconds):
        connection.exec_driver_sql("INSERT INTO {table} VALUES ('" + owner + "')")
        self.beats += 1
        come.set()
    def owned(self, connection, owner):
        return set()
    def give_back(self, connection, owner, ids):
        raise NotImplementedError

come = threading.Event()
database = Database({make}({url!r}))
lease = Lease(database, Store(), {seconds}, set)
"""


def script(place: Place, rest: str, seconds: float = LEASE) -> str:
    make = "create_async_engine" if place.awaits else "create_engine"
    return PRELUDE.format(make=make, url=place.url, table=place.table, seconds=seconds) + rest


@pytest.mark.parametrize(
    ("end", "seconds"),
    [
        ("", LEASE),
        ("sys.exit()", 0.003),  # in the midst of a heartbeat
        ("threading.Thread(target=lambda: (time.sleep(0.1), lease.beat())).start()", LEASE),
    ],
    ids=["idle", "busy", "in a thread"],
)
def test_a_process_that_has_not_stopped_it_ends_in_silence(
    place: Place, end: str, seconds: float
) -> None:
    started = f"lease.start()\ncome.wait()\n{end}"

    assert processed_apart(script(place, started, seconds), "-X", "dev") == ""


# A child that is forked during a transaction has a copy of SQLite's locks, too.
FORKED = """
lease.start()
while not lease.is_valid:
    time.sleep(0.001)
owner = lease.owner
come.clear()
child = os.fork()
if child == 0:
    status = 1
    try:
        assert not lease.is_valid and not lease.steady
        assert lease.owner != owner
        assert str(os.getpid()) in lease.owner
        lease.start()
        assert come.wait(20)
        while not lease.is_valid:
            time.sleep(0.001)
        lease.stop()
        database.close()
        status = 0
    finally:
        os._exit(status)
assert os.waitpid(child, 0)[1] == 0
assert lease.is_valid and lease.owner == owner
lease.beat()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_a_lease_of_its_own(place: Place) -> None:
    assert processed_apart(script(place, FORKED), "-W", "ignore") == ""


BLOCKED = """
import asyncio

async def block():
    lease.start()
    while lease._store.beats < 5 or not lease.is_valid:
        time.sleep(0.001)  # the event loop, too

asyncio.run(block())
lease.stop()
database.close()
"""


def test_it_goes_on_while_the_event_loop_is_blocked(place: Place) -> None:
    assert processed_apart(script(place, BLOCKED, 0.3)) == ""
