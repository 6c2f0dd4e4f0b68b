"""What one process holds: its rows, as long as somebody has them, and outcomes until written."""

import asyncio
import gc
import os
import weakref
from collections import deque
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any
from uuid import UUID, uuid4
from weakref import WeakSet

import anyio
import pytest
from anyio import to_thread
from sqlalchemy.exc import OperationalError

from eventkit import Durable, EventBus
from eventkit._core.queue import Envelope
from eventkit.outbox import Outbox
from eventkit.outbox import _holdings as module
from eventkit.outbox._rows import Outcome, Row
from eventkit.outbox._store import State
from tests.outbox.processes import event, holdings_of, keep, look, relay_of, warned
from tests.outbox.scenes import LIMIT, Paid, Placed, Scene, until
from tests.sqlalchemy.steps import done, put
from tests.witness import freed_by_anyio, ignore

pytestmark = pytest.mark.anyio

LOST = "the lease of a delivery was lost before its outcome was written"


@pytest.fixture(autouse=True)
def quiet(bus: EventBus) -> None:
    bus.report_failure = ignore


@pytest.fixture
def seen(bus: EventBus) -> list[str]:
    names: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        names.append(event.name)
        if event.name == "fails":
            raise ValueError(event.name)

    return names


def known(outbox: Outbox) -> set[UUID]:
    return {*holdings_of(outbox)._known_ids()}


def a_row(id_: UUID | None = None, **options: Any) -> Row:
    return Row(id_ or uuid4(), "mail", Durable(), options.pop("key", None), **options)


# Who has rows


@freed_by_anyio
@pytest.mark.parametrize("name", ["ada", "fails"])
async def test_rows_are_known_as_long_as_somebody_has_them_without_the_collector(
    name: str, scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str]
) -> None:
    gc.collect()
    gc.disable()
    try:
        async with bus.context() as unit:
            async with scene.begun():
                unit.publish(Placed(name))
                assert len(known(outbox)) == 1
            assert len(known(outbox)) == 1
        assert seen == [name]
        await until(lambda: not known(outbox))  # the thread that wrote it down forgets it soon

        scene.table.clear()
        scene.table.insert(event("mail", name=name))
        await outbox.run_due()
        assert seen == [name, name]
        await until(lambda: not known(outbox))
    finally:
        gc.enable()


@freed_by_anyio
async def test_whatever_drops_an_event_frees_its_rows_without_the_collector(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    envelopes: WeakSet[Any] = WeakSet()

    class Watched(Envelope):
        __slots__ = ("__weakref__",)

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            envelopes.add(self)

    monkeypatch.setattr("eventkit._core.units.Envelope", Watched)
    gc.collect()
    gc.disable()
    try:
        for end in ("rollback", "close", "discard", "raise"):
            with suppress(LookupError):
                await publish_and_drop(scene, bus, end)
            assert not known(outbox), end
            assert not envelopes, end
    finally:
        gc.enable()
    assert not seen
    assert not scene.table.rows()


async def publish_and_drop(scene: Scene, bus: EventBus, end: str) -> None:
    async with bus.context() as unit, scene.begun() as session:
        await put(session, end)
        unit.publish(Placed())
        match end:
            case "rollback":
                await done(session.rollback())
            case "close":
                await done(session.close())
            case "discard":
                unit.discard()
            case _:
                raise LookupError


async def test_the_ids_can_be_read_while_other_threads_add_rows(outbox: Outbox) -> None:
    holdings = holdings_of(outbox)
    rows: list[Row] = []

    class Meddling(UUID):
        def __hash__(self) -> int:
            if len(rows) < 100:
                rows.append(a_row())
                holdings.know(rows[-1])  # as another thread would at this moment
            return super().__hash__()

    meddling = [a_row(Meddling(bytes=uuid4().bytes)) for _ in range(5)]
    for row in meddling:
        holdings.know(row)
    assert {row.id for row in meddling} <= known(outbox)


async def test_two_threads_may_write_at_the_same_moment(outbox: Outbox) -> None:
    holdings = holdings_of(outbox)

    class Racing(deque[Outcome]):
        def popleft(self) -> Outcome:
            self.clear()  # another thread was faster
            return super().popleft()

    holdings._outcomes = Racing([Outcome(a_row())])
    assert await holdings.flush()


async def test_what_ends_in_a_thread_does_not_disturb_a_farewell(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    holdings: Any = holdings_of(outbox)

    class Meddling(Row):
        __slots__ = ("_id",)

        @property
        def id(self) -> UUID:
            holdings.begin(a_row())  # as a thread would at this moment
            return uuid4()

        @id.setter
        def id(self, value: UUID) -> None: ...

    async with relay_of(bus, outbox):
        for _ in range(3):
            holdings.begin(Meddling(uuid4(), "mail", Durable(), None))
    assert not holdings.looking


# Outcomes


async def test_an_outcome_that_is_being_written_is_waited_for(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    holdings: Any = holdings_of(outbox)
    order: list[str] = []
    real = holdings.database.run
    begun, may_go_on = anyio.Event(), anyio.Event()

    async def slow(function: Any, **options: Any) -> Any:
        if not begun.is_set():
            begun.set()
            await may_go_on.wait()
        result = await real(function, **options)
        order.append("written")
        return result

    await keep_leased(scene, bus, holdings)
    monkeypatch.setattr(holdings.database, "run", slow)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(holdings.flush)
        await begun.wait()

        async def settle() -> None:
            await holdings.settle()
            order.append("settled")

        tasks.start_soon(settle)
        await anyio.lowlevel.checkpoint()
        may_go_on.set()
    assert order == ["written", "settled"]
    assert not scene.table.rows()


async def keep_leased(scene: Scene, bus: EventBus, holdings: Any, **options: Any) -> Row:
    """Have a row that this process has leased and run, and whose outcome is not written."""
    row = a_row(scene.table.insert(event("mail"), owner=holdings.lease.owner)[0], **options)
    holdings.hear(Outcome(row))
    return row


@pytest.mark.parametrize("has_begun", [True, False])
async def test_outcomes_of_who_is_cancelled_natively_are_written_later_and_cry_no_wolf(
    has_begun: bool,
    scene: Scene,
    bus: EventBus,
    outbox: Outbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_asyncio: None,
) -> None:
    holdings: Any = holdings_of(outbox)
    real = holdings.database.run

    async def cancelled(function: Any, **options: Any) -> Any:
        if has_begun:
            await real(function, **options)  # which goes on by itself
        raise asyncio.CancelledError

    await keep_leased(scene, bus, holdings)
    monkeypatch.setattr(holdings.database, "run", cancelled)
    task = asyncio.ensure_future(holdings.settle())
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.setattr(holdings.database, "run", real)
    await keep_leased(scene, bus, holdings)
    await holdings.settle()
    assert not scene.table.rows()
    assert not holdings.lost
    assert not warned(caplog, LOST)


async def test_a_lease_that_was_lost_is_told_and_counted(
    scene: Scene, bus: EventBus, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    holdings: Any = holdings_of(outbox)
    ids = scene.table.insert(*(event("mail") for _ in range(4)), owner="host:7:another")
    rows = [a_row(id_) for id_ in ids]
    holdings.hear(Outcome(rows[0]))
    holdings.hear(Outcome(rows[1], "ValueError", 1.0))
    holdings.hear(Outcome(rows[2], "ValueError"))
    holdings.hear(Outcome(rows[3], unused=True))
    await holdings.settle()
    assert {*scene.table.rows().values()} == {(State.LEASED, 1, "host:7:another")}
    assert warned(caplog, LOST) == 3
    assert not warned(caplog, "a delivery is dead")
    assert {str(row.id) in caplog.text for row in rows[:3]} == {True}
    assert (await outbox.stats()).lost == 3


async def test_what_a_commit_completed_or_took_away_is_not_written_again(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    holdings: Any = holdings_of(outbox)
    ids = scene.table.insert(event("mail"), event("mail"), owner=holdings.lease.owner)
    rows = [a_row(id_) for id_ in ids]
    rows[0].completed = rows[1].lost = True
    for row in rows:
        holdings.hear(Outcome(row))
    await holdings.settle()
    assert len(scene.table.rows()) == 2
    assert not holdings.lost


async def test_settling_gives_up_after_a_while_and_the_outcomes_wait(
    scene: Scene, bus: EventBus, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    holdings: Any = holdings_of(outbox)
    tries = 0

    async def away(*_: object, **__: object) -> None:
        nonlocal tries
        tries += 1
        raise OperationalError("delete", None, ConnectionRefusedError())

    await keep_leased(scene, bus, holdings)
    real = holdings.database.run
    monkeypatch.setattr(holdings.database, "run", away)
    monkeypatch.setattr(module, "_SECONDS_TO_WRITE", 0.5)
    monkeypatch.setattr(module, "PAUSE_AFTER_ERROR", 0.001)
    await holdings.settle()
    assert tries > 1
    assert len(scene.table.rows()) == 1
    monkeypatch.setattr(holdings.database, "run", real)
    monkeypatch.setattr(module, "_SECONDS_TO_WRITE", 30)
    await holdings.settle()
    assert not scene.table.rows()


async def test_settling_gives_up_where_the_database_never_answers(
    scene: Scene,
    bus: EventBus,
    outbox: Outbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    holdings: Any = holdings_of(outbox)
    real, answered = holdings.database.run, list[object]()

    async def cut_off(function: Any, **options: Any) -> Any:
        await to_thread.run_sync(partial(holdings.database.call, function, **options))
        await anyio.sleep(2 * LIMIT)  # the answer is lost
        answered.append(function)

    await keep_leased(scene, bus, holdings)
    monkeypatch.setattr(holdings.database, "run", cut_off)
    monkeypatch.setattr(module, "_SECONDS_TO_WRITE", 0.5)
    await holdings.settle()
    assert not answered
    monkeypatch.setattr(holdings.database, "run", real)
    monkeypatch.setattr(module, "_SECONDS_TO_WRITE", 30)
    await holdings.settle()
    assert not scene.table.rows()
    assert not warned(caplog, LOST)


async def test_a_unit_without_durable_deliveries_does_not_wait_for_those_of_others(
    scene: Scene, bus: EventBus, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    holdings: Any = holdings_of(outbox)
    tries: list[object] = []

    async def away(function: object, **_: object) -> None:
        tries.append(function)
        raise OperationalError("delete", None, ConnectionRefusedError())

    @bus.on(Paid)
    async def note(event: Paid) -> None: ...

    await keep_leased(scene, bus, holdings)
    with monkeypatch.context() as patched:
        patched.setattr(holdings.database, "run", away)
        patched.setattr(module, "_SECONDS_TO_WRITE", 0.05)
        async with bus.context():
            bus.publish(Paid())
        await bus.dispatch(Paid())
        assert not tries
    await holdings.settle()


async def test_a_unit_of_another_thread_writes_its_outcomes_itself(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str], on_asyncio: None
) -> None:
    if scene.awaits:
        pytest.skip("such an engine belongs to one event loop")
    errors: list[BaseException] = []

    def job() -> None:
        try:
            asyncio.run(keep(scene, bus, Placed("bob")))
        except BaseException as error:
            errors.append(error)

    async with relay_of(bus, outbox) as relay:
        await look(relay)
        thread = Thread(target=job)
        thread.start()
        await to_thread.run_sync(thread.join)
    assert not errors
    assert seen == ["bob"]
    assert not scene.table.rows()


async def test_without_a_relay_who_has_run_what_is_due_says_farewell(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str]
) -> None:
    scene.table.insert(event("mail"))

    await outbox.run_due()

    assert seen == ["ada"]
    assert not scene.table.processes()


# Other tests leave threads behind that wait for work. The child takes no locks but ours.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_holds_nothing_of_its_parents(scene: Scene, outbox: Outbox) -> None:
    row = Row(uuid4(), "mail", Durable(), None)
    holdings = holdings_of(outbox)
    holdings.know(row)
    holdings.begin(row)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(write, f"{holdings.row_of(row.id)} {holdings.runs(row)}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        held = pipe.read()
    os.waitpid(child, 0)

    assert held == "None False"
    assert holdings.row_of(row.id) is row


async def test_a_bus_that_is_dropped_takes_its_outbox_along(scene: Scene) -> None:
    bus = EventBus()
    outbox = Outbox(bus, scene.engine, schema=scene.schema)
    gone = weakref.ref(outbox)
    del bus, outbox
    gc.collect()

    assert gone() is None
