"""Commits whose answer is lost, connections that are ended, servers that crash, poison, forks."""

import subprocess
import sys
from collections import Counter

import pytest

from tests.crash.conftest import Place
from tests.crash.nursery import PATIENCE, ROOT
from tests.crash.processes import Process
from tests.crash.soak import cut_connections
from tests.crash.test_leases import LONG_LEASE, finish

AMBIGUOUS = "a commit failed, and may have happened all the same"


@pytest.mark.parametrize("options", [[], ["--script"]], ids=["with a relay", "in a script"])
def test_a_commit_that_raises_and_has_happened_is_handled_once(
    place: Place, options: list[str]
) -> None:
    first, other = place.start(*options, *LONG_LEASE), place.start(*LONG_LEASE)
    other.hear("ready")
    first.tell("commit", id="one", how="raises")
    assert first.hear("refused", what="commit")["error"] == "ConnectionResetError"
    assert any(AMBIGUOUS in str(line) for line in first.said("log", level="WARNING"))
    place.settle(first, other) if not options else place.wait_until(
        lambda: not place.query("select id from eventkit_outbox")
    )
    other.stop()
    first.stop()
    found = place.count()
    assert (found.business, found.missing, found.phantom) == (1, [], [])
    assert found.twice.total() == 0


def test_deliveries_survive_connections_that_are_ended(postgres: Place) -> None:
    server, name = postgres.server, postgres.engine.url.database
    assert server is not None
    assert name is not None
    first, other = postgres.start("--holds"), postgres.start()
    other.hear("ready")
    first.tell("commit", id="one")
    first.hear("waits", 2)
    cut_connections(server, name)
    first.tell("go")
    finish(postgres, first, other)
    found = postgres.count()
    assert (found.business, found.missing, found.phantom) == (1, [], [])
    assert found.twice["exact"] == 0


def test_deliveries_survive_a_server_that_crashes(postgres: Place) -> None:
    server = postgres.server
    assert server is not None
    first, other = postgres.start("--holds"), postgres.start()
    other.hear("ready")
    for number in range(20):
        first.tell("commit", id=f"{number}")
    first.hear("done", 20)
    server.restart_at_once()
    first.tell("go")
    finish(postgres, first, other)
    found = postgres.count()
    assert (found.business, found.missing, found.phantom) == (20, [], [])
    assert found.twice["exact"] == 0


def test_what_ends_each_process_is_dead_after_its_attempts_and_the_others_are_handled(
    place: Place,
) -> None:
    options = ["--handlers", "plain", "--attempts", "3"]
    writer = place.start("--no-relay", "--script", *options)
    for number in range(59):
        writer.tell("commit", id=f"{number}", how="exits" if number == 30 else "")
    writer.hear("done", 59)
    writer.stop()

    def is_dead() -> bool:
        return bool(place.query("select id from eventkit_outbox where state = 2"))

    ended = list[Process]()
    process = place.start(*options)
    while not is_dead():
        if process.ended_within(0.1) is not None:
            ended.append(process)
            process = place.start(*options)
    finish(place, process)
    found = place.count("plain")
    assert [each.wait() for each in ended] == [7, 7, 7]
    assert found.missing == [("plain", "30")]
    assert not found.phantom
    assert found.rows.total() == 1
    # What a process had begun beside the poison, and had not written down.
    in_flight = Counter(id for each in ended for id in each.in_flight("plain")[0])
    effects = Counter(str(id) for (id,) in place.query("select id from effects"))
    assert {*(effects - in_flight).values()} <= {1}


def test_who_is_killed_while_it_shuts_down_is_reaped(place: Place) -> None:
    victim, other = place.start("--holds", "--shutdown-timeout", "600"), place.start()
    other.hear("ready")
    victim.tell("commit", id="one")
    victim.hear("waits", 2)
    victim.tell("stop")
    victim.hear("log", text="delivering before shutdown")
    victim.kill()
    finish(place, other)
    found = place.count()
    assert (found.business, found.missing, found.phantom) == (1, [], [])
    assert found.twice.total() == 0


@pytest.mark.parametrize("killed", [False, True], ids=["ends", "is killed"])
def test_a_forked_child_has_an_owner_of_its_own(place: Place, killed: bool) -> None:
    if place.driver not in ("pysqlite", "psycopg", "asyncpg"):
        pytest.skip("a script that does not await")
    url = place.workers.url.replace("asyncpg", "psycopg")
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.forking", url, "killed" if killed else "ends"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parent, child, again = done.stdout.split()
    assert parent == again != child
    assert {pid for _, pid, _ in (each.split(":") for each in (parent, child))} == {
        str(pid) for pid in map(int, done.stderr.split()[-2:])
    }
    survivor = place.start("--handlers", "plain")
    finish(place, survivor)
    found = place.count("plain")
    assert (found.business, found.missing, found.phantom) == (3, [], [])
    assert found.twice.total() == 0
    assert not place.query("select owner from eventkit_process")


def test_four_processes_on_one_file_never_find_it_locked(
    sqlite: Place, soak_seconds: float
) -> None:
    four = [sqlite.start("--seed", f"{seed}", "--failures", "0") for seed in range(4)]
    for process in four:
        process.hear("ready")
        process.tell("soak")
    four[0].ended_within(min(60.0, soak_seconds))  # the time that it takes
    for process in four:
        process.tell("rest")
    for process in four:
        process.hear("rests")
    finish(sqlite, *four)
    found = sqlite.count()
    assert found.business > 0
    assert (found.missing, found.phantom) == ([], [])
    assert found.twice["exact"] == 0
    for process in four:
        assert not process.said("commit failed")
        assert not process.said("raises", error="OperationalError")
