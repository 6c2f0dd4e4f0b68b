"""A process that kills itself at a named point: nothing is lost, and nothing is made up."""

import signal

import pytest
from sqlalchemy.orm import Session

from tests.crash.conftest import Place
from tests.crash.processes import Process
from tests.crash.tables import Business
from tests.crash.worker import POINTS

KILLED = -signal.SIGKILL

BEFORE_THE_COMMIT = ["before the commit", "before the insert", "after the insert"]
WHERE_IT_RUNS = [
    "after the commit",
    "after the release",
    "before the handler",
    "in the handler",
    "before the handler's commit",
    "after the effect",
    "before the deletion",
    "after the deletion",
    "after the writing",
]
OF_MESSAGES = ["after the note", "after the message's commit"]
OF_FAILURES = ["before the failure", "after the failure"]
OF_CLAIMS = ["before the claim", "after the claim", "after the claim's commit"]
OF_REAPERS = ["before the reaping", "after the reaping"]
OF_FAREWELLS = ["before the farewell", "after the farewell"]


def test_each_point_has_its_test() -> None:
    named = [*BEFORE_THE_COMMIT, *WHERE_IT_RUNS, *OF_MESSAGES, *OF_FAILURES, *OF_CLAIMS]
    assert sorted([*named, *OF_REAPERS, *OF_FAREWELLS]) == sorted(POINTS)


def dies_at(victim: Process, point: str) -> None:
    victim.hear("dies", point=point)
    assert victim.wait() == KILLED


def is_all_done(place: Place, survivor: Process, *, twice: int = 1) -> None:
    """What was committed has its effects; at most those in flight have them twice."""
    place.settle(survivor)
    survivor.stop()
    found = place.count()
    assert not found.missing
    assert not found.phantom
    assert found.twice["exact"] == 0
    assert found.twice["plain"] <= twice
    assert not found.rows


@pytest.mark.parametrize("point", BEFORE_THE_COMMIT)
def test_what_was_not_committed_leaves_nothing(place: Place, point: str) -> None:
    survivor = place.start()
    victim = place.start("--kill", point)
    victim.tell("commit", id="one")
    dies_at(victim, point)
    is_all_done(place, survivor, twice=0)
    assert place.count().business == 0
    assert not survivor.said("begins")


@pytest.mark.parametrize("point", WHERE_IT_RUNS)
def test_what_was_committed_is_handled_by_another_process(place: Place, point: str) -> None:
    survivor = place.start()
    victim = place.start("--kill", point)
    victim.tell("commit", id="one")
    dies_at(victim, point)
    is_all_done(place, survivor)
    assert place.count().business == 1


@pytest.mark.parametrize("point", OF_MESSAGES)
def test_a_message_that_comes_again_has_its_effects_once(place: Place, point: str) -> None:
    with Session(place.engine) as session, session.begin():
        session.add(Business(id="one"))  # as of the service that has sent it
    survivor = place.start()
    victim = place.start("--kill", point)
    victim.tell("receive", id="one")
    dies_at(victim, point)
    survivor.tell("receive", id="one")
    survivor.hear("done", what="receive")
    is_all_done(place, survivor, twice=0)


@pytest.mark.parametrize("point", OF_FAILURES)
def test_a_failure_that_was_not_written_down_is_tried_again(place: Place, point: str) -> None:
    survivor = place.start()
    victim = place.start("--kill", point, "--failures", "1")
    victim.tell("commit", id="one", how="raises in handlers")
    dies_at(victim, point)
    is_all_done(place, survivor)
    assert place.count().business == 1


@pytest.mark.parametrize("point", OF_CLAIMS)
def test_what_was_claimed_is_handled_by_another_process(place: Place, point: str) -> None:
    writer = place.start("--no-relay", "--script")
    victim = place.start("--kill", point)
    writer.tell("commit", id="one")
    dies_at(victim, point)
    survivor = place.start()
    writer.stop()
    is_all_done(place, survivor)
    assert place.count().business == 1


@pytest.mark.parametrize("point", OF_REAPERS)
def test_a_dead_process_is_reaped_by_the_next_one(place: Place, point: str) -> None:
    first = place.start("--holds")
    victim = place.start("--kill", point)
    victim.hear("ready")
    first.tell("commit", id="one")
    first.hear("waits", 2)
    first.kill()
    dies_at(victim, point)
    survivor = place.start()
    is_all_done(place, survivor)
    assert place.count().business == 1


@pytest.mark.parametrize("point", OF_FAREWELLS)
def test_who_dies_while_it_leaves_is_reaped(place: Place, point: str) -> None:
    survivor = place.start()
    victim = place.start("--kill", point, "--holds", "--shutdown-timeout", "0.1")
    victim.tell("commit", id="one")
    victim.hear("waits", 2)
    victim.tell("stop")
    dies_at(victim, point)
    is_all_done(place, survivor)
    assert place.count().business == 1
