"""What becomes of durable deliveries: they are handled, fail, are tried again, and die."""

import logging
import math
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import anyio
import pytest
from anyio import to_thread
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from eventkit import Durable, EventBus, EventDepthError, LeaseLostError, current_delivery, named
from eventkit.exceptions import DispatchError
from eventkit.outbox import Outbox, complete_with
from eventkit.outbox._store import State
from tests.contract.bus import kept_reports
from tests.databases import Row
from tests.outbox.processes import holdings_of
from tests.outbox.scenes import LIMIT, Paid, Placed, Scene, lapse
from tests.sqlalchemy.steps import done, put

pytestmark = pytest.mark.anyio

LEASED = (State.LEASED, 1)


class Refused(Exception):
    """What handlers here raise, with the event in its text."""


async def publish(scene: Scene, bus: EventBus, event: object | None = None) -> None:
    """Publish in a unit of work and a transaction of its own."""
    async with bus.context(), scene.begun() as session:
        await put(session)
        bus.publish(Placed() if event is None else event)


# Failures


async def test_a_delivery_that_fails_is_tried_again_later_and_later_until_it_is_dead(
    bus: EventBus, outbox: Outbox, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    ids: list[UUID] = []
    attempts: list[tuple[int, int]] = []
    siblings: list[str] = []
    backoff = Durable(attempts=3, backoff=lambda attempt, error: 100.0 * 10**attempt)

    @bus.on(Placed, durable=backoff, name="mail")
    async def mail(event: Placed) -> None:
        delivery = current_delivery()
        ids.append(delivery.id)
        attempts.append((delivery.attempt, delivery.attempts))
        raise Refused(f"no mail for {event.name}")

    @bus.on(Placed, durable=True, name="stock")
    async def stock(event: Placed) -> None:
        siblings.append(event.name)

    @bus.on(Placed, name="memory")
    async def memory(event: Placed) -> None:
        siblings.append(event.name)

    await publish(scene, bus)
    for attempt, pause in ((1, 1000), (2, 10_000)):
        assert scene.kept() == {"mail": (State.READY, attempt)}
        (due_at,) = due_times(scene)
        assert 0.8 * pause - 20 <= due_at - time.time() <= 1.2 * pause + 20
        scene.table.all_due()
        report = await outbox.run_due()
        assert (report.handled, len(report.failures), report.requeued) == (0, 1, 0)
    assert scene.kept() == {"mail": (State.DEAD, 3)}
    scene.table.all_due()
    assert (await outbox.run_due()).failures == ()

    assert attempts == [(1, 3), (2, 3), (3, 3)]
    assert len({*ids}) == 1
    assert {*ids} == scene.ids()
    assert siblings == ["ada", "ada"]
    levels = [each.levelno for each in caplog.records if each.getMessage().startswith("event han")]
    assert levels == [logging.WARNING, logging.WARNING, logging.ERROR]
    assert bus.stats.failed == 3


def due_times(scene: Scene) -> list[float]:
    return [due_at for (due_at,) in scene.table.sql("select due_at from {p}eventkit_outbox")]


async def test_what_an_exception_says_is_not_in_the_table(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    @bus.on(Placed, durable=Durable(attempts=1), name="mail")
    async def mail(event: Placed) -> None:
        raise Refused(f"no mail for {event.name}")

    @bus.on(Placed, durable=True, name="stock")
    async def stock(event: Placed) -> None:
        async with scene.begun() as session:
            await put(session, "first")

    await publish(scene, bus, Placed("secret"))

    assert scene.kept() == {"mail": (State.DEAD, 1), "stock": (State.READY, 1)}
    (dead,) = await outbox.deliveries()
    (waiting,) = await outbox.deliveries("ready")
    assert dead.error is not None
    assert dead.error.startswith("tests.outbox.test_deliveries.Refused at ")
    assert f"{__file__}:" in dead.error
    assert waiting.error is not None
    assert waiting.error.startswith("sqlalchemy.exc.IntegrityError at ")
    for stored in (dead, waiting):
        assert "secret" not in str(stored)
        assert "first" not in str(stored)


async def test_a_backoff_that_fails_or_is_negative_gives_a_pause_all_the_same(
    bus: EventBus, outbox: Outbox, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(attempt: int, error: BaseException) -> float:
        raise LookupError

    def negative(attempt: int, error: BaseException) -> float:
        return -5.0

    def endless(attempt: int, error: BaseException) -> float:
        return math.inf

    for name, backoff in (("broken", broken), ("negative", negative), ("endless", endless)):

        @bus.on(Placed, durable=Durable(backoff=backoff), name=name)
        async def handle(event: Placed) -> None:
            raise Refused

    await publish(scene, bus)

    assert scene.kept() == dict.fromkeys(("broken", "negative", "endless"), (State.READY, 1))
    assert len(await outbox.deliveries("ready")) == 3  # whose times can be shown
    assert caplog.text.count("backoff failed") == 1


async def test_a_handler_that_ends_the_process_by_an_exception_uses_an_attempt(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    @bus.on(Placed, durable=True, name="mail", thread=False)
    def mail(event: Placed) -> None:
        sys.exit(3)

    with pytest.raises(SystemExit):
        await publish(scene, bus)
    await outbox._holdings.settle()
    assert scene.kept() == {"mail": (State.READY, 1)}


async def test_a_handler_that_takes_too_long_fails_as_others_do(scene: Scene) -> None:
    bus = EventBus(handler_timeout=0.02)
    scene.outbox(bus)

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        await anyio.sleep_forever()

    await publish(scene, bus)

    assert scene.kept() == {"mail": (State.READY, 1)}
    assert bus.stats.failed == 1


# Outside of any transaction


async def test_outside_of_a_transaction_a_row_is_there_before_the_handler_starts(
    bus: EventBus, outbox: Outbox, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[object] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        kept.append(scene.kept())

    for _ in range(2):
        async with bus.context():
            bus.publish(Placed())
            assert scene.kept() == {}

    assert kept == [{"mail": LEASED}] * 2
    assert scene.kept() == {}
    assert caplog.text.count("belongs to no transaction") == 1  # once per line that publishes
    assert f"{__file__}:" in caplog.text


@pytest.mark.parametrize("way", ["even_on_failure", "release", "drain"])
async def test_what_was_decided_by_the_publisher_is_written_as_the_unit_is_drained(
    bus: EventBus, outbox: Outbox, scene: Scene, way: str
) -> None:
    kept: list[object] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        kept.append(scene.kept())

    with suppress(LookupError):
        async with bus.context() as unit:
            session = scene.session()
            if way == "even_on_failure":
                bus.publish(Placed(), even_on_failure=True)
            else:
                bus.publish(Placed())
                if way == "release":
                    unit.release()
                else:
                    await unit.drain()
            await put(session)
            await done(session.rollback())
            await done(session.close())
            raise LookupError

    assert kept == [{"mail": LEASED}]
    assert scene.kept() == {}


async def test_what_cannot_be_written_runs_in_memory_and_is_an_error(
    bus: EventBus, outbox: Outbox, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[object] = []
    bus.subscribe(Placed, seen.append, durable=True, name="mail", thread=False)
    scene.table.sql("alter table {p}eventkit_outbox rename to away")

    try:
        async with bus.context():
            bus.publish(Placed())
    finally:
        renamed = "{p}away" if scene.schema else "away"
        scene.table.sql(f"alter table {renamed} rename to eventkit_outbox")

    assert seen == [Placed()]
    assert bus.stats.handled == 1
    (line,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "could not be kept" in line.getMessage()
    async with bus.context():
        bus.publish(Placed("again"))
    assert seen == [Placed(), Placed("again")]


async def test_a_database_that_never_answers_holds_up_no_drain_for_longer_than_a_lease(
    bus: EventBus, scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[object] = []
    bus.subscribe(Placed, seen.append, durable=True, name="mail", thread=False)
    outbox = scene.outbox(bus, lease=1.5)
    answered: list[object] = []

    async def cut_off(function: object, **options: object) -> None:
        await anyio.sleep(2 * LIMIT)
        answered.append(function)

    monkeypatch.setattr(holdings_of(outbox).database, "run", cut_off)
    async with bus.context():
        bus.publish(Placed())
    assert not answered
    assert seen == [Placed()]
    assert "could not be kept" in caplog.text


async def test_dispatch_keeps_nothing_and_raises_and_what_its_handlers_publish_is_kept(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    kept: list[object] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        kept.append(scene.kept())
        async with scene.begun() as session:
            await put(session)
            bus.publish(Paid())
        kept.append(scene.kept())

    @bus.on(Placed, durable=True, name="stock")
    async def stock(event: Placed) -> None:
        raise Refused

    @bus.on(Paid, durable=True, name="bill")
    async def bill(event: Paid) -> None:
        kept.append(scene.kept())

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Placed())

    assert [type(each) for each in caught.value.exceptions] == [Refused]
    assert kept == [{}, {"bill": LEASED}, {"bill": LEASED}]
    assert scene.kept() == {}


# Completion by the handler's own commit


async def test_the_commit_of_a_handler_completes_its_delivery(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    kept: list[object] = []

    @bus.on(Placed, durable=True, name="reserve")
    async def reserve(event: Placed) -> None:
        session = scene.session()
        complete_with(session)
        session.add(Row(name="reserved"))
        kept.append(scene.kept())
        await done(session.commit())
        kept.append(scene.kept())
        await done(session.close())

    await publish(scene, bus)

    assert kept == [{"reserve": LEASED}, {}]
    assert scene.names() == ["ada", "reserved"]
    assert bus.stats.handled == 1
    assert (await outbox.stats()).lost == 0


async def test_a_commit_that_fails_completes_nothing_and_the_next_attempt_has_the_one_effect(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    parents = ["nobody", None]
    durable = Durable(backoff=lambda attempt, error: 0.0)

    @bus.on(Placed, durable=durable, name="reserve")
    async def reserve(event: Placed) -> None:
        async with scene.begun() as session:
            complete_with(session)
            session.add(Row(name="reserved", parent=parents.pop(0)))

    reports = kept_reports(bus)
    await publish(scene, bus)
    assert scene.kept() == {"reserve": (State.READY, 1)}
    assert scene.names() == ["ada"]
    assert (await outbox.run_due()).handled == 1

    assert scene.kept() == {}
    assert scene.names() == ["ada", "reserved"]
    assert [type(each) for each in reports] == [IntegrityError]
    reports.clear()


async def test_a_scoped_session_completes_as_the_one_does_that_it_stands_for(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    kept: list[object] = []
    scoped: Any = (
        async_scoped_session(scene.sessions(), scopefunc=lambda: 1)
        if scene.awaits
        else scoped_session(scene.sessions())
    )

    @bus.on(Placed, durable=True, name="reserve")
    async def reserve(event: Placed) -> None:
        complete_with(scoped)
        await put(scoped, "reserved")
        await done(scoped.commit())
        kept.append(scene.kept())
        await done(scoped.remove())

    await publish(scene, bus)

    assert kept == [{}]
    assert scene.names() == ["ada", "reserved"]


async def test_a_rollback_after_the_mark_completes_nothing(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    kept: list[object] = []

    @bus.on(Placed, durable=True, name="reserve")
    async def reserve(event: Placed) -> None:
        session = scene.session()
        complete_with(session)
        await put(session, "lost")
        await done(session.rollback())
        kept.append(scene.kept())
        await done(session.close())

    await publish(scene, bus)

    assert kept == [{"reserve": LEASED}]
    assert scene.kept() == {}  # it ended well
    assert scene.names() == ["ada"]


async def test_without_a_row_the_mark_does_nothing(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    async def reserve(event: Placed) -> None:
        async with scene.begun() as session:
            complete_with(session)
            session.add(Row(name=event.name))

    bus.subscribe(Placed, reserve, durable=True, name="reserve")

    async with scene.begun() as session:
        complete_with(session)
    await bus.dispatch(Placed("dispatched"))
    with outbox.in_memory():
        async with bus.context():
            bus.publish(Placed("in memory"))
    outbox.detach()
    async with bus.context():
        bus.publish(Placed("without an outbox"))

    assert scene.names() == ["dispatched", "in memory", "without an outbox"]
    assert scene.kept() == {}


async def test_a_commit_is_refused_when_another_process_has_been_given_the_delivery(
    bus: EventBus, outbox: Outbox, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    ids: list[UUID] = []

    @bus.on(Placed, durable=True, name="reserve")
    async def reserve(event: Placed) -> None:
        ids.append(current_delivery().id)
        scene.table.change(ids[0], "owner = 'another', attempt = 2")
        async with scene.begun() as session:
            complete_with(session)
            await put(session, "twice")

    reports = kept_reports(bus)
    await publish(scene, bus)

    assert [type(each) for each in reports] == [LeaseLostError]
    assert str(ids[0]) in str(reports.pop())
    assert scene.names() == ["ada"]
    assert scene.table.rows() == {ids[0]: (State.LEASED, 2, "another")}


async def test_an_outcome_that_comes_too_late_is_a_warning_and_is_counted(
    bus: EventBus, outbox: Outbox, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    ids: list[UUID] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        ids.append(current_delivery().id)
        scene.table.change(ids[0], "owner = 'another', attempt = 2")

    await publish(scene, bus)

    assert scene.table.rows() == {ids[0]: (State.LEASED, 2, "another")}
    (line,) = [each for each in caplog.records if "the lease of a delivery was lost" in each.msg]
    assert line.levelno == logging.WARNING
    assert str(ids[0]) in line.getMessage()
    assert (await outbox.stats()).lost == 1


@pytest.mark.parametrize("attempts", [1, 25])
async def test_what_fails_after_the_commit_is_an_error_and_is_not_tried_again(
    bus: EventBus,
    outbox: Outbox,
    scene: Scene,
    caplog: pytest.LogCaptureFixture,
    attempts: int,
) -> None:
    @bus.on(Placed, durable=Durable(attempts=attempts), name="reserve")
    async def reserve(event: Placed) -> None:
        async with scene.begun() as session:
            complete_with(session)
            await put(session, "reserved")
        raise Refused

    await publish(scene, bus)

    assert scene.kept() == {}
    assert scene.names() == ["ada", "reserved"]
    (line,) = [
        each
        for each in caplog.records
        if "failed after complete_with had completed its delivery" in each.getMessage()
    ]
    assert line.levelno == logging.ERROR
    assert "a delivery is dead" not in caplog.text
    assert (await outbox.run_due(within=10_000)).handled == 0
    assert (await outbox.stats()).lost == 0


async def test_only_a_session_of_the_outboxs_engine_completes(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    errors: list[Exception] = []

    @bus.on(Placed, durable=True, name="reserve")
    async def reserve(event: Placed) -> None:
        with Session(create_engine("sqlite://")) as session:
            try:
                complete_with(session)
            except ValueError as error:
                errors.append(error)

    await publish(scene, bus)

    assert "another database" in str(errors.pop())
    with pytest.raises(TypeError, match="takes a session"):
        complete_with("no session")  # type: ignore[arg-type]


# What handlers publish


@named("shop.step")
@dataclass(frozen=True)
class Step:
    number: int


@pytest.mark.parametrize("inside", [True, False], ids=["in a transaction", "outside"])
async def test_what_handlers_publish_has_its_depth_and_ends_also_after_a_restart(
    scene: Scene, inside: bool
) -> None:
    depths: list[tuple[int, int]] = []

    def process(*, relay: bool) -> tuple[EventBus, Outbox]:
        bus = EventBus(max_depth=3)

        @bus.on(Placed, name="first")
        async def first(event: Placed) -> None:
            await step(bus, Step(1))

        @bus.on(Step, durable=Durable(attempts=1), name="next")
        async def take(event: Step) -> None:
            depths.append((event.number, current_delivery().depth))
            await step(bus, Step(event.number + 1))

        return bus, scene.outbox(bus, relay=relay)

    async def step(bus: EventBus, event: Step) -> None:
        if inside:
            async with scene.begun() as session:
                await put(session, str(event.number))
                bus.publish(event)
        else:
            bus.publish(event)

    bus, _ = process(relay=False)
    await publish(scene, bus)
    assert scene.table.sql("select depth, payload from {p}eventkit_outbox") == [(1, '{"number":1}')]
    assert depths == []

    bus, outbox = process(relay=True)
    reports = kept_reports(bus)
    await outbox.run_due()

    assert depths == [(1, 1), (2, 2), (3, 3)]
    assert [type(each) for each in reports] == [EventDepthError]
    reports.clear()
    assert scene.kept() == {"next": (State.DEAD, 1)}
    assert scene.names() == (["1", "2", "3", "ada"] if inside else ["ada"])


async def test_a_subscription_that_is_cancelled_meanwhile_leaves_its_row_to_others(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen: list[str] = []

    def mail(event: Placed) -> None:
        seen.append(event.name)

    subscription = bus.subscribe(Placed, mail, durable=True, name="mail")
    async with bus.context():
        async with scene.begun() as session:
            await put(session)
            bus.publish(Placed())
        subscription.cancel()

    assert seen == []
    assert bus.stats.requeued == 1
    assert scene.kept() == {"mail": LEASED}  # until the lease looks twice
    bus.subscribe(Placed, mail, durable=True, name="mail")
    await to_thread.run_sync(lapse, outbox)
    assert (await outbox.run_due()).handled == 1
    assert seen == ["ada"]


async def test_what_handlers_publish_is_done_in_the_same_unit_with_a_row_of_its_own(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen: list[object] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        async with scene.begun() as session:
            await put(session, "mail")
            bus.publish(Paid("inside"))
        bus.publish(Paid("outside"))
        seen.append(scene.counted())

    @bus.on(Paid, durable=True, name="bill")
    async def bill(event: Paid) -> None:
        assert scene.counted()["bill", "LEASED"] >= 1
        seen.append(event.name)

    await publish(scene, bus)

    assert seen[0] == {("mail", "LEASED"): 1, ("bill", "LEASED"): 1}
    assert seen[1:] == ["inside", "outside"]
    assert scene.kept() == {}


async def test_what_a_handler_that_fails_has_published_is_as_its_transactions_say(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen: list[str] = []

    @bus.on(Placed, durable=Durable(attempts=1), name="mail")
    async def mail(event: Placed) -> None:
        async with scene.begun() as session:
            await put(session, "mail")
            bus.publish(Paid("committed"))
        bus.publish(Paid("lost"))
        raise Refused

    @bus.on(Paid, durable=True, name="bill")
    async def bill(event: Paid) -> None:
        seen.append(event.name)

    await publish(scene, bus)

    assert seen == ["committed"]
    assert scene.kept() == {"mail": (State.DEAD, 1)}
