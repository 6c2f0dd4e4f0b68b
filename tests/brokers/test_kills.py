"""Services that are killed and stopped, and brokers that are killed and cut off."""

import asyncio
import signal
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from tests.brokers.conftest import on_each, on_each_own
from tests.brokers.places import Place
from tests.crash.nursery import PATIENCE
from tests.crash.processes import Process
from tests.crash.proxy import Proxy

KILLED = -signal.SIGKILL


def ended_by_sigterm(process: Process) -> None:
    process.signal(signal.SIGTERM)
    process.hear("stopped")
    process.wait()


def numbers(what: str, *processes: Process, **facts: object) -> list[int]:
    """The numbers of all events of which processes have said this."""
    said = [each for process in processes for each in process.said(what, **facts)]
    return sorted(int(each["number"]) for each in said)


def test_what_a_killed_process_was_handling_is_handled_by_another(place: Place) -> None:
    publisher = place.publisher()
    victim = place.consumer()
    publisher.tell("publish", number=1, how="hangs")
    victim.hear("waits", number=1)
    victim.kill()
    heir = place.consumer("--healthy")
    heir.hear("ends", number=1)
    ended_by_sigterm(heir)
    assert place.left() == 0


def test_what_a_killed_process_was_handling_is_taken_over_by_one_that_was_there(
    place: Place,
) -> None:
    publisher = place.publisher()
    pods = [place.consumer(), place.consumer()]
    publisher.tell("publish", number=1, how="hangs")
    victim = first_to_say("waits", pods)
    (heir,) = {*pods} - {victim}
    heir.tell("heal")
    victim.kill()
    heir.hear("ends", number=1)
    ended_by_sigterm(heir)
    assert place.left() == 0


def first_to_say(what: str, processes: Sequence[Process]) -> Process:
    """Wait for the one that says it first. Each has a pipe of its own, so all are asked."""
    for _ in range(int(PATIENCE * 100)):
        for each in processes:
            if each.said(what):
                return each
        time.sleep(0.01)
    raise AssertionError([each.story() for each in processes])


def test_who_is_told_to_stop_ends_what_it_handles_and_leaves_the_rest(place: Place) -> None:
    publisher = place.publisher()
    first = place.consumer("--returns-after", "8")
    publisher.tell("publish", number=0, how="hangs")
    publisher.tell("publish", number=1, times=20)
    first.hear("waits", number=0)
    publisher.hear("published", 21)
    first.signal(signal.SIGTERM)
    first.tell("go")
    first.hear("stopped")
    first.wait()
    second = place.consumer("--returns-after", "8")
    rest = {*range(21)} - {*numbers("ends", first)}
    for each in rest:
        second.hear("ends", number=each)
    ended_by_sigterm(second)
    assert numbers("ends", first, second) == [*range(21)]
    assert numbers("begins", first, second) == [*range(21)]
    assert place.left() == 0


def test_who_is_told_to_stop_between_two_attempts_stops_and_another_handles_it(
    place: Place,
) -> None:
    publisher = place.publisher()
    first = place.consumer("--returns-after", "5", "--pause", "2")
    publisher.tell("publish", number=1, how="fails here")
    first.hear("begins", 2, number=1)
    ended_by_sigterm(first)
    assert len(first.said("begins")) == 2
    second = place.consumer("--returns-after", "5", "--healthy")
    second.hear("ends", number=1)
    ended_by_sigterm(second)
    assert place.left() == 0


@on_each("counts_deliveries")
def test_an_event_that_kills_each_process_is_a_dead_letter_at_last(place: Place) -> None:
    publisher = place.publisher()
    publisher.tell("publish", number=1, how="kills")
    publisher.hear("published", number=1)
    for _ in range(3):
        victim = place.start("--group", "billing", "--max-deliveries", "3")
        victim.hear("dies", number=1)
        assert victim.wait() == KILLED
    survivor = place.consumer("--max-deliveries", "3")
    (letter,) = place.dead_letters(1)
    assert letter.headers["eventkit-reason"] == "crashed"
    assert letter.headers["eventkit-error"] == "delivered 4 times without an answer"
    publisher.tell("publish", number=2)
    survivor.hear("ends", number=2)
    ended_by_sigterm(survivor)
    assert not survivor.said("begins", number=1)
    assert place.left() == 0


def test_a_broker_that_is_killed_and_comes_back_goes_on_with_both_services(
    own_place: Place,
) -> None:
    server = own_place.server
    publisher, consumer = both_on(own_place)
    server.kill()
    publisher.tell("publish", number=2)
    assert not publisher.hear("published", number=2)["taken"]
    publisher.tell("stats")
    assert publisher.hear("stats")["failed"] == 1
    server.start()
    if not server.keeps:
        asyncio.run(own_place.prepare())
    goes_on(publisher, consumer, first=3)


@on_each_own("lets_go")
def test_who_is_told_to_stop_while_the_broker_is_away_stops(own_place: Place) -> None:
    server = own_place.server
    publisher, consumer = both_on(own_place)
    server.kill()
    publisher.tell("publish", number=2)
    assert not publisher.hear("published", number=2)["taken"]
    ended_by_sigterm(publisher)
    ended_by_sigterm(consumer)


@on_each_own("closes_connections")
def test_a_broker_that_closes_all_connections_goes_on_with_both_services(own_place: Place) -> None:
    server = own_place.server
    publisher, consumer = both_on(own_place)
    server.close_connections()
    goes_on(publisher, consumer, first=2)


@on_each("has_one_address")
def test_a_network_that_fails_and_comes_back_goes_on_with_both_services(place: Place) -> None:
    proxy = Proxy(urlsplit(place.url).port or 0)
    by_proxy = place.url.replace(f":{urlsplit(place.url).port}", f":{proxy.port}")
    publisher, consumer = both_on(place, by_proxy)
    proxy.cut()
    publisher.tell("publish", number=2)
    assert not publisher.hear("published", number=2)["taken"]
    proxy.mend()
    goes_on(publisher, consumer, first=3)
    proxy.close()


def both_on(place: Place, url: str | None = None) -> tuple[Process, Process]:
    """Start a publisher and a consumer, between which one event has gone."""
    publisher = place.publisher("--timeout", "2", url=url)
    consumer = place.consumer("--returns-after", "10", url=url)
    publisher.tell("publish", number=1)
    consumer.hear("ends", number=1)
    return publisher, consumer


def goes_on(publisher: Process, consumer: Process, *, first: int) -> None:
    """Publish until the broker takes one, and five more; each that it has taken is handled."""
    number, deadline = first, time.monotonic() + PATIENCE
    publisher.tell("publish", number=number)
    while not publisher.hear("published", number=number)["taken"]:
        assert time.monotonic() < deadline, publisher.story()
        number += 1
        publisher.tell("publish", number=number)
    publisher.tell("publish", number=number + 1, times=5)
    publisher.hear("published", number=number + 5)
    taken = numbers("published", publisher, taken=True)
    refused = numbers("published", publisher, taken=False)
    for each in taken:
        consumer.hear("ends", number=each)
    publisher.tell("stats")
    asked = publisher.told.count("stats")
    assert publisher.hear("stats", asked)["failed"] == len(refused)
    ended_by_sigterm(consumer)
    # One that failed may have arrived: whoever hears nothing does not know.
    assert {*taken} <= {*numbers("ends", consumer)} <= {*taken, *refused}
