"""Processes that stand still, are slow, or are cut off from the database, and come back."""

import signal
import time
from collections.abc import Iterator

import pytest

from tests.crash.conftest import Place
from tests.crash.processes import LONG, LOST, Process
from tests.crash.proxy import Proxy
from tests.crash.soak import REAPED

# Nobody is to be taken for dead.
LONG_LEASE = ["--lease", f"{LONG}"]


def finish(place: Place, *living: Process) -> None:
    place.settle(*living)
    for process in living:
        process.stop()


def reaped(*processes: Process) -> list[str]:
    """Owners that were taken for dead."""
    lines = [line for process in processes for line in process.said("log", text=REAPED)]
    return [name for line in lines for name in str(line["facts"]["processes"]).split(", ")]


def test_who_stands_still_for_longer_than_its_lease_has_lost_what_it_runs(place: Place) -> None:
    sleeper = place.start("--holds")
    other = place.start()
    other.hear("ready")
    sleeper.tell("commit", id="one")
    waits = {line["handler"]: line for line in [sleeper.hear("waits", n) for n in (1, 2)]}

    sleeper.stand_still()
    other.hear("ends", handler="plain")
    other.hear("ends", handler="exact")
    sleeper.signal(signal.SIGCONT)
    sleeper.tell("go")

    sleeper.hear("raises", handler="exact", error="LeaseLostError")
    lines = [sleeper.hear("log", n, text=LOST, level="WARNING") for n in (1, 2)]
    lost = {line["facts"]["delivery_id"] for line in lines}
    assert lost == {line["delivery"] for line in waits.values()}
    finish(place, other, sleeper)
    found = place.count()
    assert not found.missing
    assert (found.twice["exact"], found.twice["plain"]) == (0, 1)  # plain has been done, in vain


def test_a_completion_that_comes_too_late_takes_nothing_from_the_next_owner(place: Place) -> None:
    sleeper, second = place.start("--holds"), place.start("--holds")
    second.hear("ready")
    sleeper.tell("commit", id="one")
    sleeper.hear("waits", 2)
    sleeper.stand_still()
    second.hear("waits", 2)
    sleeper.signal(signal.SIGCONT)
    sleeper.tell("go")
    sleeper.hear("raises", handler="exact", error="LeaseLostError")
    sleeper.hear("log", text=LOST, level="WARNING")
    assert len(place.query("select id from eventkit_outbox where state = 1")) == 2
    second.kill()
    finish(place, sleeper)
    found = place.count()
    assert (found.missing, found.phantom) == ([], [])
    assert (found.twice["exact"], found.twice["plain"]) == (0, 1)


def test_what_waited_behind_it_does_not_run_there_any_more(place: Place) -> None:
    sleeper = place.start("--holds", "--handlers", "plain")
    other = place.start("--handlers", "plain")
    other.hear("ready")
    for number in range(30):
        sleeper.tell("commit", id=f"{number}")
    sleeper.hear("done", 30)

    sleeper.stand_still()
    other.hear("ends", 30)
    sleeper.signal(signal.SIGCONT)
    sleeper.tell("commit", id="afterwards")
    sleeper.tell("go")
    sleeper.hear("ends", id="afterwards")

    finish(place, other, sleeper)
    found = place.count("plain")
    assert not found.missing
    running = {line["id"] for line in sleeper.said("waits")} - {"afterwards"}
    assert found.twice["plain"] <= len(running) < 30


def test_a_handler_and_a_blocked_loop_may_take_several_leases(place: Place) -> None:
    long, blocked, other = (place.start(*LONG_LEASE) for _ in range(3))
    other.hear("ready")
    long.tell("commit", id="long", how="long")
    blocked.tell("commit", id="blocked", how="blocks")
    long.hear("ends", 2)
    blocked.hear("ends", 2)
    finish(place, long, blocked, other)
    found = place.count()
    assert not found.missing
    assert found.twice.total() == 0
    assert not reaped(long, blocked, other)


def test_a_commit_may_take_several_leases(place: Place) -> None:
    slow, other = place.start("--slow-insert", *LONG_LEASE), place.start(*LONG_LEASE)
    other.hear("ready")
    slow.tell("commit", id="one")
    slow.hear("done")
    # On SQLite it holds the lock that heartbeats need, so a relay may be the one that runs them.
    finish(place, slow, other)
    found = place.count()
    assert not found.missing
    assert found.twice.total() == 0
    assert not reaped(slow, other)


@pytest.fixture
def proxy(postgres: Place) -> Iterator[Proxy]:
    assert postgres.server is not None
    made = Proxy(postgres.server.port)
    yield made
    made.close()


def test_who_cannot_renew_its_lease_starts_nothing_and_goes_on_afterwards(
    postgres: Place, proxy: Proxy
) -> None:
    place = postgres
    url = proxy.reach(place.workers.url)
    cut_off = place.workers.start("--holds", "--handlers", "plain", url=url)
    other = place.start("--handlers", "plain")
    other.hear("ready")
    for number in range(30):
        cut_off.tell("commit", id=f"{number}")
    cut_off.hear("done", 30)

    proxy.cut()
    cut_off.tell("commit", id="never")
    cut_off.hear("refused", what="commit")
    other.hear("ends", 30)  # what was another's, too: a lease is over
    running = {line["id"] for line in cut_off.said("waits")}
    assert len(running) < 30
    cut_off.tell("go")
    cut_off.hear("raises", len(running))  # the handlers that ran have no database, either
    assert {line["id"] for line in cut_off.said("begins")} == running

    proxy.mend()
    other.stand_still()
    place.wait_until(lambda: commits(cut_off, "afterwards"))
    cut_off.hear("ends", id="afterwards")
    other.signal(signal.SIGCONT)
    finish(place, cut_off, other)
    found = place.count("plain")
    assert (found.business, found.missing, found.phantom) == (31, [], [])
    assert found.twice.total() <= other.lost()  # it may have stood still before it wrote


def commits(process: Process, id: str) -> bool:
    """Whether it has been committed; else it is tried again."""
    if process.said("done", id=id):
        return True
    if len(process.said("refused")) >= len([1 for each in process.told if each == "commit"]) - 30:
        process.tell("commit", id=id)
    return False


def test_while_somebody_has_sqlites_lock_nobody_is_taken_for_dead(sqlite: Place) -> None:
    place = sqlite
    three = [place.start("--holds", *LONG_LEASE) for _ in range(3)]
    for number, process in enumerate(three):
        process.tell("commit", id=f"{number}")
        process.hear("waits", 2)
    with place.engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        time.sleep(2.5 * LONG)  # the outage itself
        connection.rollback()
    for process in three:
        process.tell("go")
    for process in three:
        process.hear("ends", 2)
    finish(place, *three)
    found = place.count()
    assert not found.missing
    assert found.twice.total() == 0
    assert not reaped(*three)


def test_while_the_database_is_away_nobody_is_taken_for_dead(postgres: Place) -> None:
    place = postgres
    server = place.server
    assert server is not None
    three = [place.start("--holds", *LONG_LEASE) for _ in range(3)]
    for number, process in enumerate(three):
        process.tell("commit", id=f"{number}")
        process.hear("waits", 2)
    server.stop(signal.SIGQUIT)
    for process in three:
        process.tell("commit", id="never")
        process.hear("refused", what="commit")
    time.sleep(1.5 * LONG)  # the outage itself
    server.start()
    for process in three:
        process.tell("go")
    finish(place, *three)
    found = place.count()
    assert (found.business, found.missing, found.phantom) == (3, [], [])
    assert found.twice["exact"] == 0
    assert not reaped(*three)
    for process in three:
        warnings = process.said("log", text="the outbox cannot reach its database")
        assert len(warnings) <= 1  # once per minute
