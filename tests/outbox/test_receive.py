"""Messages of other services: received once, kept, and handled as what is committed here."""

import logging
import math
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from secrets import token_hex
from typing import Any
from uuid import UUID

import anyio
import pytest
from anyio import to_thread
from anyio.lowlevel import checkpoint
from sqlalchemy import Connection, create_engine

from eventkit import Delivery, DomainEvent, Durable, EventBus, Observer, current_delivery
from eventkit._core.ambient import carried
from eventkit._core.bus import state_of
from eventkit._core.drainer import Drainer
from eventkit._core.loops.threads import Entrance
from eventkit._core.state import Host
from eventkit.exceptions import (
    EventDepthError,
    EventEncodingError,
    InvalidEventTypeError,
    OutboxSchemaError,
)
from eventkit.outbox import Outbox, _relay
from eventkit.outbox._database import Database
from eventkit.outbox._store import State
from tests.contract.bus import kept_reports
from tests.outbox.processes import Clock, holdings_of, relay_of
from tests.outbox.scenes import LIMIT, Paid, Placed, Scene, lapse, relaying, until
from tests.witness import ignore

pytestmark = pytest.mark.anyio

HEADERS = {"ce-id": "7", "ce-source": "/orders"}


@dataclass(frozen=True, slots=True)
class Told(DomainEvent):
    name: str = "ada"


@pytest.fixture
def ran(bus: EventBus) -> list[str]:
    """The handlers of `Placed` that have run: a durable one, one with a key, and one in memory."""
    ran: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        ran.append(f"mail {event.name}")

    @bus.on(Placed, durable=Durable(key=lambda event: event.name), name="keyed")
    async def keyed(event: Placed) -> None:
        ran.append(f"keyed {event.name}")

    @bus.on(Placed, name="memory")
    async def memory(event: Placed) -> None:
        ran.append(f"memory {event.name}")

    return ran


async def receive(outbox: Outbox, id: str = "1", event: object = None, **options: Any) -> bool:
    """Receive a message as the consumer `billing`."""
    given: dict[str, Any] = {"consumer": "billing", "message_id": id, **options}
    return await outbox.receive(Placed() if event is None else event, **given)


def inbox(scene: Scene) -> list[tuple[str, str]]:
    """Consumer and id of each message that is noted."""
    statement = "select consumer, message_id from {p}eventkit_inbox order by consumer, message_id"
    return [(consumer, id_) for consumer, id_ in scene.table.sql(statement)]


@asynccontextmanager
async def hosted(bus: EventBus, *, is_crowded: bool = False) -> AsyncGenerator[Drainer]:
    """An application delivers in the background on this event loop."""
    state = state_of(bus)
    async with anyio.create_task_group() as tasks:
        drainer = Drainer(state, tasks, concurrency=4, max_pending=None)
        host = Host(Entrance(), drainer.submit, None, lambda: is_crowded, drainer.begin)
        state.add_host(host)
        try:
            yield drainer
        finally:
            state.remove_host(host)
            with anyio.CancelScope(shield=True):
                await drainer.close(LIMIT)


# What is committed, and what runs


async def test_a_message_is_committed_and_its_handlers_run_before_it_is_acknowledged(
    bus: EventBus, outbox: Outbox, scene: Scene, ran: list[str]
) -> None:
    assert await receive(outbox) is True

    assert inbox(scene) == [("billing", "1")]
    assert sorted(ran) == ["mail ada", "memory ada"]
    assert scene.kept() == {"keyed": (State.READY, 0)}
    stats = bus.stats
    assert (stats.published, stats.accepted, stats.handled, stats.requeued) == (1, 3, 2, 1)
    assert (await outbox.run_due()).handled == 1
    assert sorted(ran) == ["keyed ada", "mail ada", "memory ada"]
    assert scene.kept() == {}


async def test_a_message_that_was_received_before_leaves_no_trace(
    bus: EventBus,
    outbox: Outbox,
    scene: Scene,
    ran: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    await receive(outbox)
    ran.clear()
    before, told = bus.stats, list[object]()

    class Watcher(Observer):
        def published(self, event: object, deliveries: object) -> None:
            told.append(event)

        def released(self, events: object) -> None:
            told.append(events)

    bus.observe(Watcher())
    with caplog.at_level(logging.DEBUG, "eventkit"):
        assert await receive(outbox) is False

    assert bus.stats == before
    assert (ran, told) == ([], [])
    assert scene.kept() == {"keyed": (State.READY, 0)}
    (line,) = [each for each in caplog.records if "received before" in each.getMessage()]
    assert line.levelno == logging.DEBUG
    assert "consumer=billing" in line.getMessage()
    assert "message_id=1" in line.getMessage()
    await outbox.run_due()


async def test_messages_are_told_apart_by_consumer_and_by_id(
    outbox: Outbox, scene: Scene, ran: list[str]
) -> None:
    for consumer, message_id in (("billing", "1"), ("billing", "2"), ("stock", "1")):
        assert await receive(outbox, message_id, consumer=consumer)

    assert inbox(scene) == [("billing", "1"), ("billing", "2"), ("stock", "1")]
    assert Counter(ran) == {"mail ada": 3, "memory ada": 3}
    await outbox.run_due()


async def test_a_message_that_arrives_in_twenty_tasks_at_once_is_handled_once(
    outbox: Outbox, scene: Scene, ran: list[str]
) -> None:
    were_new: list[bool] = []

    async def once() -> None:
        were_new.append(await receive(outbox))

    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(once)

    assert Counter(were_new) == {True: 1, False: 19}
    assert sorted(ran) == ["mail ada", "memory ada"]
    await outbox.run_due()


async def test_two_processes_that_receive_one_message_at_once_handle_it_once(
    scene: Scene, bus: EventBus, ran: list[str]
) -> None:
    other = EventBus()

    @other.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        ran.append("mail ada")

    outboxes = [scene.outbox(bus), scene.outbox(other)]
    were_new: list[bool] = []

    async def once(outbox: Outbox) -> None:
        were_new.append(await receive(outbox))

    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(once, outboxes[number % 2])

    assert Counter(were_new)[True] == 1
    assert ran.count("mail ada") == 1
    await outboxes[0].run_due()


async def test_an_event_that_nobody_handles_is_noted_and_counted(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    assert await receive(outbox)
    assert not await receive(outbox)

    assert inbox(scene) == [("billing", "1")]
    assert (bus.stats.published, bus.stats.accepted) == (1, 0)


async def test_an_event_without_durable_handlers_is_handled_once(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen: list[str] = []

    @bus.on(Placed)
    async def memory(event: Placed) -> None:
        seen.append(event.name)

    assert await receive(outbox)
    assert not await receive(outbox)
    assert seen == ["ada"]
    assert scene.kept() == {}


async def test_observers_are_told_as_of_a_publish(outbox: Outbox, bus: EventBus) -> None:
    told: list[str] = []

    class Watcher(Observer):
        def published(self, event: object, deliveries: object) -> None:
            told.append("published")

        def released(self, events: object) -> None:
            told.append("released")

        def delivery(self, delivery: Delivery) -> Any:
            told.append(f"delivery {delivery.handler}")
            return super().delivery(delivery)

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None: ...

    bus.observe(Watcher())
    await receive(outbox)

    assert told == ["published", "released", "delivery mail"]


async def test_what_fails_is_reported_and_tried_again_and_the_message_is_not(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    reported = kept_reports(bus)

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        raise RuntimeError("mail")

    @bus.on(Placed, name="memory")
    async def memory(event: Placed) -> None:
        raise RuntimeError("memory")

    assert await receive(outbox) is True

    assert sorted(map(str, reported)) == ["mail", "memory"]
    assert scene.kept() == {"mail": (State.READY, 1)}
    assert await receive(outbox) is False


# What handlers know of the message


async def test_a_handler_knows_the_message_also_in_a_run_from_a_row(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    seen: list[object] = []

    @bus.on(Placed, durable=Durable(backoff=lambda attempt, error: 0.0), name="mail")
    async def mail(event: Placed) -> None:
        delivery = current_delivery()
        facts = (delivery.id, delivery.event_id, delivery.received, {**carried.get()})
        seen.append((delivery.attempt, *facts))
        if delivery.attempt == 1:
            raise RuntimeError

    bus.report_failure = ignore
    token = carried.set({"traceparent": "00-1"})
    await receive(outbox, headers=HEADERS, event_id=UUID(int=7))
    carried.reset(token)
    (stored,) = await outbox.deliveries("ready")
    await outbox.run_due(within=60)

    facts = (stored.id, UUID(int=7), HEADERS, {"traceparent": "00-1"})
    assert seen == [(1, *facts), (2, *facts)]
    assert stored.event_id == UUID(int=7)


async def test_the_headers_are_those_of_the_moment_and_without_any_it_is_received_all_the_same(
    scene: Scene, bus: EventBus
) -> None:
    seen: list[object] = []
    relay, outbox = EventBus(), scene.outbox(bus, relay=False)
    for each in (bus, relay):

        @each.on(Placed, durable=True, name="mail")
        async def mail(event: Placed) -> None:
            seen.append(current_delivery().received)

    headers = {"a": "1"}
    await receive(outbox, "1", headers=headers)
    headers["a"] = "2"
    await receive(outbox, "2")
    await scene.outbox(relay).run_due()

    assert sorted(seen, key=str) == [{"a": "1"}, {}]


async def test_an_event_has_the_id_of_the_message_or_its_own_or_a_new_one(
    bus: EventBus, outbox: Outbox
) -> None:
    seen: list[UUID] = []

    @bus.on(object, name="note")
    async def note(event: object) -> None:
        seen.append(current_delivery().event_id)

    own = Told()
    await receive(outbox, "1", own, event_id=UUID(int=7))
    await receive(outbox, "2", own)
    await receive(outbox, "3", Placed())
    await receive(outbox, "4", Placed())

    assert seen[:2] == [UUID(int=7), own.event_id]
    assert len({*seen}) == 4


async def test_what_a_handler_publishes_is_not_received_and_carries_on(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen: list[object] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        async with scene.begun():
            bus.publish(Paid())

    @bus.on(Paid, durable=True, name="paid")
    async def paid(event: Paid) -> None:
        delivery = current_delivery()
        assert delivery.cause is not None
        seen.append((delivery.received, {**carried.get()}, delivery.cause.handler))
        assert delivery.event_id != UUID(int=7)

    token = carried.set({"traceparent": "00-1"})
    await receive(outbox, headers=HEADERS, event_id=UUID(int=7))
    carried.reset(token)

    assert seen == [(None, {"traceparent": "00-1"}, "mail")]


async def test_the_place_that_receives_is_where_the_event_comes_from_in_debug_mode(
    scene: Scene,
) -> None:
    for debug in (True, False):
        bus, seen = EventBus(debug=debug), list[str | None]()

        @bus.on(Placed)
        async def note(event: Placed, seen: list[str | None] = seen) -> None:
            seen.append(current_delivery().published_from)

        await receive(scene.outbox(bus), str(debug))
        (place,) = seen
        assert (place is not None and place.startswith(__file__)) is debug


# Where handlers run


async def test_an_application_on_the_loop_runs_them_in_the_background(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    may_end, ended = anyio.Event(), list[str]()

    for name, durable in (("mail", True), ("memory", False)):

        @bus.on(Placed, durable=durable, name=name)
        async def handle(event: Placed, name: str = name) -> None:
            await may_end.wait()
            ended.append(name)

    with anyio.fail_after(LIMIT):
        async with hosted(bus):
            assert await receive(outbox)
            assert ended == []
            assert scene.kept() == {"mail": (State.LEASED, 1)}
            assert not await receive(outbox)
            may_end.set()
    assert sorted(ended) == ["mail", "memory"]
    await outbox._keeper.settle()


async def test_where_much_waits_handlers_run_here_and_what_has_a_row_waits_for_a_relay(
    bus: EventBus, outbox: Outbox, scene: Scene, ran: list[str]
) -> None:
    async with hosted(bus, is_crowded=True) as drainer:
        assert await receive(outbox)
        assert ran == ["memory ada"]
        assert (drainer.units_waiting, drainer.units_draining) == (0, 0)
        assert scene.kept() == {"mail": (State.READY, 0), "keyed": (State.READY, 0)}
    await outbox.run_due()


async def test_a_process_that_only_writes_leaves_them_to_others(
    bus: EventBus, scene: Scene, ran: list[str]
) -> None:
    outbox = scene.outbox(bus, relay=False)
    assert await receive(outbox)
    assert ran == ["memory ada"]
    assert scene.kept() == {"mail": (State.READY, 0), "keyed": (State.READY, 0)}
    await outbox.run_due()


async def test_a_relay_is_woken_for_what_has_a_key(
    outbox: Outbox, scene: Scene, ran: list[str]
) -> None:
    async with relaying(outbox):
        await receive(outbox)
        await until(lambda: "keyed ada" in ran)
        await until(lambda: not scene.ids())


async def test_it_is_a_unit_of_work_of_its_own(
    bus: EventBus, outbox: Outbox, scene: Scene, ran: list[str]
) -> None:
    with suppress(ZeroDivisionError):
        async with bus.context() as unit:
            assert await receive(outbox)
            assert sorted(ran) == ["mail ada", "memory ada"]
            assert unit.pending == ()
            raise ZeroDivisionError
    assert bus.stats.discarded == 0
    await outbox.run_due()


async def test_no_transaction_of_the_caller_takes_part(
    bus: EventBus, scene: Scene, ran: list[str]
) -> None:
    outbox = scene.outbox(bus)
    with suppress(ZeroDivisionError):
        async with bus.context(), scene.begun() as session:
            assert session.in_transaction()
            assert await receive(outbox)
            raise ZeroDivisionError
    assert inbox(scene) == [("billing", "1")]
    assert sorted(ran) == ["mail ada", "memory ada"]
    await outbox.run_due()


async def test_in_a_handler_its_cause_is_that_delivery(bus: EventBus, outbox: Outbox) -> None:
    seen: list[str] = []

    @bus.on(Paid, name="poll")
    async def poll(event: Paid) -> None:
        assert await receive(outbox)

    @bus.on(Placed, name="mail")
    async def mail(event: Placed) -> None:
        delivery = current_delivery()
        seen.extend(each.handler for each in delivery.chain())
        assert delivery.depth == 1

    await bus.dispatch(Paid())
    assert seen == ["poll", "mail"]


async def test_too_many_handlers_deep_it_is_refused_before_anything_is_written(
    scene: Scene,
) -> None:
    bus = EventBus(max_depth=1)
    outbox = scene.outbox(bus)

    @bus.on(Paid, name="poll")
    async def poll(event: Paid) -> None:
        bus.publish(7)

    @bus.on(int, name="again")
    async def again(event: int) -> None:
        with pytest.raises(EventDepthError, match="again"):
            await receive(outbox)

    await bus.dispatch(Paid())
    assert bus.stats.failed == 0
    assert inbox(scene) == []


# Nothing is kept


async def test_in_memory_nothing_is_kept_and_all_handlers_run(
    outbox: Outbox, scene: Scene, ran: list[str]
) -> None:
    with outbox.in_memory():
        assert await receive(outbox)
        assert await receive(outbox)

    assert Counter(ran) == {"mail ada": 2, "keyed ada": 2, "memory ada": 2}
    assert (inbox(scene), scene.kept()) == ([], {})
    assert await receive(outbox)
    await outbox.run_due()


async def test_nor_is_anything_with_sqlite_in_memory(bus: EventBus, ran: list[str]) -> None:
    engine = create_engine("sqlite://")
    with Outbox(bus, engine) as outbox:
        assert await receive(outbox, headers=HEADERS)
        assert await receive(outbox)
    engine.dispose()

    assert Counter(ran) == {"mail ada": 2, "keyed ada": 2, "memory ada": 2}


# What is refused, and what fails


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"consumer": ""}, r"the consumer of receive\(\) is empty: pass the name of"),
        ({"consumer": "a\0b"}, r"the consumer 'a\\x00b' has a null character"),
        ({"message_id": ""}, r"the message_id of receive\(\) is empty: pass an id that"),
        ({"message_id": "\0"}, r"the message_id '\\x00' has a null character"),
        ({"consumer": "é" * 501}, r"the consumer has more than 1000 bytes"),
        ({"message_id": "é" * 501}, r"the message_id has more than 1000 bytes"),
    ],
)
async def test_what_messages_cannot_be_told_by_is_refused(
    outbox: Outbox, scene: Scene, ran: list[str], options: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        await receive(outbox, **options)
    assert (inbox(scene), ran) == ([], [])


async def test_an_event_that_cannot_be_stored_is_refused_before_the_database_is_asked(
    outbox: Outbox, scene: Scene, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Database, "run", None)
    with pytest.raises(EventEncodingError):
        await receive(outbox, event=Placed(name=7))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidEventTypeError):
        await receive(outbox, event=Placed)
    monkeypatch.undo()
    assert (inbox(scene), ran) == ([], [])


async def test_the_longest_names_are_kept(outbox: Outbox, scene: Scene, ran: list[str]) -> None:
    """None of them is shorter when it is packed, as PostgreSQL packs what it indexes."""
    consumer, id_, key = (token_hex(500) for _ in range(3))
    await receive(outbox, id_, Placed(name=key), consumer=consumer)

    assert inbox(scene) == [(consumer, id_)]
    assert scene.kept() == {"keyed": (State.READY, 0)}


def key_of_nobody(event: object) -> str:
    raise KeyError(event)


def long_key(event: object) -> str:
    return "é" * 501


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (key_of_nobody, "the key function of a durable handler failed: KeyError"),
        (long_key, "the key of durable handler keyed has more than 1000 bytes"),
    ],
)
async def test_a_key_that_nobody_can_tell_or_keep_is_the_fault_of_the_event(
    bus: EventBus, outbox: Outbox, scene: Scene, key: Callable[[object], str], message: str
) -> None:
    seen: list[Placed] = []
    bus.subscribe(Placed, seen.append, name="keyed", durable=Durable(key=key))
    with pytest.raises(ValueError, match=message):
        await receive(outbox)
    assert (inbox(scene), seen) == ([], [])


def lacking(connection: Connection) -> str:
    return "no table: add_tables()"


async def test_without_tables_the_remedy_is_named_until_they_are_there(
    bus: EventBus, scene: Scene, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = scene.outbox(bus)
    with monkeypatch.context() as patched:
        patched.setattr(holdings_of(outbox).store, "problem", lacking)
        with pytest.raises(OutboxSchemaError, match="add_tables"):
            await receive(outbox)
    assert ran == []
    assert await receive(outbox)
    await outbox.run_due()


async def test_a_detached_outbox_receives_nothing(outbox: Outbox) -> None:
    outbox.detach()
    with pytest.raises(RuntimeError, match="is detached, so it receives nothing"):
        await receive(outbox)


async def test_what_the_database_raises_comes_out_and_the_message_may_come_again(
    bus: EventBus, outbox: Outbox, scene: Scene, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ConnectionResetError("the database is away")

    with monkeypatch.context() as patched:
        patched.setattr(holdings_of(outbox).store, "insert", fail)
        with pytest.raises(ConnectionResetError):
            await receive(outbox)
    assert (inbox(scene), scene.kept(), ran) == ([], {}, [])
    assert (bus.stats.published, bus.stats.discarded) == (0, 0)
    assert await receive(outbox) is True
    assert sorted(ran) == ["mail ada", "memory ada"]
    await outbox.run_due()


async def test_a_commit_that_happened_and_raised_is_run_once_by_the_rules_of_the_lease(
    bus: EventBus, outbox: Outbox, scene: Scene, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = holdings_of(outbox).database
    run = database.run

    async def run_and_raise(*args: Any, **options: Any) -> Any:
        await run(*args, **options)
        raise ConnectionResetError("the answer was lost")

    await outbox._keeper._examine()
    with monkeypatch.context() as patched:
        patched.setattr(database, "run", run_and_raise)
        with pytest.raises(ConnectionResetError) as raised:
            await receive(outbox)
    assert ran == []
    assert inbox(scene) == [("billing", "1")]
    assert scene.kept() == {"mail": (State.LEASED, 1), "keyed": (State.READY, 0)}

    assert await receive(outbox) is False
    await to_thread.run_sync(lapse, outbox)  # although the traceback holds the rows
    assert scene.kept()["mail"] == (State.READY, 0)
    del raised
    assert (await outbox.run_due()).handled == 2
    assert sorted(ran) == ["keyed ada", "mail ada"]


async def test_cancelled_while_it_commits_it_is_in_doubt_and_runs_once(
    bus: EventBus, outbox: Outbox, scene: Scene, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, begun, go_on = holdings_of(outbox).store, threading.Event(), threading.Event()
    insert = store.insert

    def insert_and_wait(*args: Any) -> None:
        insert(*args)
        begun.set()
        assert go_on.wait(LIMIT)

    await outbox._keeper._examine()
    monkeypatch.setattr(store, "insert", insert_and_wait)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive, outbox)
        assert await to_thread.run_sync(begun.wait, LIMIT)
        tasks.cancel_scope.cancel()
    assert ran == []
    go_on.set()
    await until(lambda: inbox(scene))

    assert await receive(outbox) is False
    await to_thread.run_sync(lapse, outbox)
    assert (await outbox.run_due()).handled == 2
    assert sorted(ran) == ["keyed ada", "mail ada"]
    assert bus.stats.published == 0


async def test_cancelled_before_its_transaction_it_leaves_nothing(
    bus: EventBus, outbox: Outbox, scene: Scene, ran: list[str]
) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await receive(outbox)
    assert scope.cancelled_caught
    assert (inbox(scene), scene.kept(), ran) == ([], {}, [])
    assert await receive(outbox) is True
    await outbox.run_due()


async def test_cancelled_while_handlers_run_here_what_is_durable_runs_later(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen: list[str] = []
    scope = anyio.CancelScope()

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        seen.append("begun")
        if len(seen) == 1:
            scope.cancel()
        await checkpoint()
        seen.append("ended")

    @bus.on(Placed, name="memory")
    async def memory(event: Placed) -> None:
        await anyio.sleep_forever()

    with scope:
        await receive(outbox)
    assert scope.cancelled_caught
    assert (bus.stats.requeued, bus.stats.undelivered) == (1, 1)
    assert await receive(outbox) is False
    assert scene.kept() == {"mail": (State.READY, 0)}
    await outbox.run_due()
    assert seen == ["begun", "begun", "ended"]


# How long messages are noted

WEEK = 7 * 86400


def age(scene: Scene, seconds: float, *ids: str) -> None:
    """As if these had been received so many seconds earlier."""
    for id_ in ids:
        scene.table.sql(
            f"update {{p}}eventkit_inbox set received_at = received_at - {seconds}"
            f" where message_id = '{id_}'"
        )


def noted(scene: Scene) -> list[str]:
    return [id_ for _, id_ in inbox(scene)]


async def test_it_is_noted_by_the_clock_of_the_database(outbox: Outbox, scene: Scene) -> None:
    await receive(outbox)
    words = holdings_of(outbox).store._statements.words
    ((age,),) = scene.table.sql(f"select {words['clock']} - received_at from {{p}}eventkit_inbox")
    assert 0 <= age < LIMIT


async def test_a_relay_forgets_messages_after_a_week_at_its_start_and_once_per_hour(
    bus: EventBus, outbox: Outbox, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    for id_ in "abcd":
        await receive(outbox, id_)
    age(scene, WEEK + 60, "a", "b")
    age(scene, WEEK - 60, "c")
    clock = Clock(outbox, monkeypatch)
    async with relay_of(bus, outbox) as relay:
        assert await relay._forget_messages() is False
        assert noted(scene) == ["c", "d"]
        age(scene, 120, "c")
        await clock.go_on(3590, renewing=False)
        await relay._forget_messages()
        assert noted(scene) == ["c", "d"]
        await clock.go_on(20)
        await relay._forget_messages()
        assert noted(scene) == ["d"]
    assert await receive(outbox, "a") is True


async def test_it_forgets_few_at_once_and_goes_on_at_the_next_look(
    bus: EventBus, outbox: Outbox, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        await receive(outbox, str(number))
        age(scene, WEEK + 100 - number, str(number))
    monkeypatch.setattr(_relay, "_FORGET_AT_ONCE", 2)
    async with relay_of(bus, outbox) as relay:
        assert await relay._forget_messages() is True
        assert noted(scene) == ["2", "3", "4"]
        assert await relay._forget_messages() is True
        assert await relay._forget_messages() is False
        assert noted(scene) == []
        relay.stop()
        await receive(outbox)
        age(scene, 2 * WEEK, "1")
        relay._forgot_at = -math.inf
        assert await relay._forget_messages() is False
    assert noted(scene) == ["1"]


async def test_a_running_relay_forgets_after_it_has_run_what_is_due(
    bus: EventBus, outbox: Outbox, scene: Scene, ran: list[str]
) -> None:
    with outbox.in_memory():
        await receive(outbox)
    ran.clear()
    holdings_of(outbox).relays = False
    await receive(outbox)
    age(scene, 2 * WEEK, "1")
    async with relaying(outbox):
        await until(lambda: not noted(scene) and not scene.ids())
    assert sorted(ran) == ["keyed ada", "mail ada", "memory ada"]
