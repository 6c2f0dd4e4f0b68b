"""What is claimed and run next: room, fairness, and what a run knows of its row."""

from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest
import structlog

from eventkit import Delivery, Durable, EventBus, Observer, current_delivery
from eventkit._core.ambient import carried
from eventkit._core.bus import state_of
from eventkit.exceptions import EventDepthError
from eventkit.outbox import Outbox
from eventkit.outbox._source import RowSource, Stock
from eventkit.outbox._store import NewEvent, NewRow, State
from tests.outbox.processes import Clock, event, holdings_of, keep, look, relay_of, warned
from tests.outbox.rows import PUBLISHED
from tests.outbox.scenes import LIMIT, Paid, Placed, Scene, relaying, until
from tests.witness import ignore

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def quiet(bus: EventBus) -> None:
    bus.report_failure = ignore


class Gate:
    """A handler that waits until it may go on, and what runs in it."""

    def __init__(self, bus: EventBus, name: str, **durable: Any) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.may_end = anyio.Semaphore(0)

        @bus.on(Placed, durable=Durable(**durable), name=name)
        async def handle(event: Placed) -> None:
            self.begun.append(event.name)
            await self.may_end.acquire()
            self.ended.append(event.name)

    def let_all_go(self) -> None:
        for _ in range(1000):
            self.may_end.release()


def has_begun(gate: Gate, number: int) -> bool:
    return len(gate.begun) == number


def has_ended_more(gate: Gate, number: int) -> bool:
    return len(gate.ended) > number


# Room


async def test_a_handler_has_all_places_while_nobody_else_waits(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    slow = Gate(bus, "slow")
    scene.table.insert(*(event("slow", name=str(number)) for number in range(12)))
    async with relaying(outbox):
        await until(lambda: len(slow.begun) == 4)
        for more in range(5, 9):
            slow.may_end.release()
            await until(partial(has_begun, slow, more))
            assert len(slow.ended) == more - 4
        slow.let_all_go()
        await until(lambda: not scene.table.rows())


async def test_a_slow_handler_holds_up_others_by_no_more_than_what_runs_and_leaves_work_to_others(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    slow, mail = Gate(bus, "slow"), Gate(bus, "mail")
    mail.let_all_go()
    scene.table.insert(*(event("slow") for _ in range(500)))
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        await until(lambda: len(slow.begun) == 4)
        scene.table.insert(*(event("mail", name=str(number)) for number in range(20)))
        while (ended := len(mail.ended)) < 20:
            for _ in range(3):
                await look(relay)
            await holdings_of(outbox).settle()
            most = relay._source.most_held()
            assert counted(scene, State.LEASED) <= 2 * most  # the others are for other processes
            slow.may_end.release()  # it ends, and a mail has its place
            await until(partial(has_ended_more, mail, ended))
        slow.let_all_go()
        await until(lambda: not bus.stats.running)
    assert counted(scene, State.LEASED) == 0


def counted(scene: Scene, state: State) -> int:
    return sum(each == state for each, _, _ in scene.table.rows().values())


async def test_of_several_handlers_that_wait_each_has_half_of_the_places(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    first, second = Gate(bus, "first"), Gate(bus, "second")
    scene.table.insert(*(event("first") for _ in range(3)), *(event("second") for _ in range(3)))
    scene.table.sql("update {p}eventkit_outbox set due_at = 1 where handler = 'first'")
    async with relay_of(bus, outbox, concurrency=6) as relay:
        await look(relay)
        await until(lambda: bus.stats.running == 6)
        assert (len(first.begun), len(second.begun)) == (3, 3)
        first.let_all_go()
        second.let_all_go()
    stock = Stock(5)
    stock._running = Counter({"first": 2, "second": 2})
    stock._waiting = {"first": [(0, None)], "second": [(1, None)]}  # type: ignore[dict-item]
    assert stock.take() is None  # a place is left free


async def test_a_relay_holds_no_more_than_it_has_finished_lately_and_no_more_than_500(
    scene: Scene, bus: EventBus, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("eventkit.outbox._source.current_time", lambda: now)
    source = RowSource(holdings_of(outbox), state_of(bus), 4, lambda: None)
    assert source.most_held() == 4
    for handler, number in (("a", 20), ("b", 600)):
        source.stock._running[handler] += number
        for _ in range(number):
            source.end(handler)
        assert source.most_held() == min(500, len(source._ended))
        now += 1.5
    assert source.most_held() == 500
    now += 1
    assert source.most_held() == 4
    assert await source.claim() == 0


async def test_no_room_no_claim(scene: Scene, bus: EventBus, outbox: Outbox) -> None:
    gates = [Gate(bus, name) for name in ("a", "b", "c", "d", "e")]
    scene.table.insert(event("a", "b", "c", "d"))
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        await until(lambda: bus.stats.running == 4)
        scene.table.insert(event("e"))
        await look(relay)
        assert scene.kept()["e"] == (State.READY, 0)
        for gate in gates:
            gate.let_all_go()


async def test_the_outbox_may_have_places_of_its_own(scene: Scene, bus: EventBus) -> None:
    outbox = scene.outbox(bus, concurrency=2)
    gate = Gate(bus, "slow")
    scene.table.insert(*(event("slow") for _ in range(5)))
    async with relay_of(bus, outbox, concurrency=7) as relay:
        await look(relay)
        await until(lambda: len(gate.begun) == 2)
        assert bus.stats.running == 2
        gate.let_all_go()


async def test_what_is_claimed_is_known_though_the_event_loop_is_blocked_meanwhile(
    scene: Scene, bus: EventBus, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, database = Clock(outbox, monkeypatch), holdings_of(outbox).database
    gate, real = Gate(bus, "mail"), database.run
    gate.let_all_go()
    scene.table.insert(event("mail"))

    async def late(*args: Any, **options: Any) -> Any:
        result = await real(*args, **options)
        await clock.go_on(2 * clock.lease.seconds)
        return result

    monkeypatch.setattr(database, "run", late)
    with anyio.move_on_after(LIMIT):  # or it is given back and claimed for ever
        await outbox.run_due()
    assert gate.ended == ["ada"]
    assert clock.lease.given_back == 0
    assert scene.kept() == {}


# What a run knows


async def test_a_run_knows_its_row(scene: Scene, bus: EventBus, outbox: Outbox) -> None:
    seen: list[Delivery] = []

    @bus.on(Placed, durable=Durable(attempts=7), name="mail")
    async def mail(event: Placed) -> None:
        seen.append(current_delivery())

    id_, event_id = uuid4(), uuid4()
    row = NewRow(id_, "mail", None)
    scene.table.insert(
        NewEvent(event_id, "shop.placed", '{"name": "bob"}', None, 3, PUBLISHED, [row])
    )
    scene.table.change(id_, "attempt = 4")
    report = await outbox.run_due()
    assert (report.handled, report.failures, report.requeued) == (1, (), 0)
    (delivery,) = seen
    assert (delivery.id, delivery.event_id) == (id_, event_id)
    assert (delivery.attempt, delivery.attempts, delivery.depth) == (5, 7, 3)
    assert delivery.published_at.timestamp() == PUBLISHED
    assert (delivery.event, delivery.handler, delivery.cause) == (Placed("bob"), "mail", None)
    assert "attempt 5" in repr(delivery)


async def test_ids_stay_the_same_over_attempts(scene: Scene, bus: EventBus, outbox: Outbox) -> None:
    seen: list[tuple[UUID, UUID, int]] = []

    @bus.on(Placed, durable=Durable(attempts=3), name="mail")
    async def mail(event: Placed) -> None:
        delivery = current_delivery()
        seen.append((delivery.id, delivery.event_id, delivery.attempt))
        raise ValueError

    await keep(scene, bus, Placed())
    await outbox.run_due(within=10_000)
    assert [attempt for *_, attempt in seen] == [1, 2, 3]
    assert len({ids for *ids_, _ in seen for ids in [tuple(ids_)]}) == 1
    assert scene.kept() == {"mail": (State.DEAD, 3)}


async def test_the_depth_of_a_chain_goes_on_after_a_restart(scene: Scene, outbox: Outbox) -> None:
    bus = EventBus(max_depth=3)
    errors: list[Exception] = []

    def tell(delivery: Delivery, error: Exception) -> None:
        errors.append(error)

    bus.report_failure = tell
    deep = scene.outbox(bus)

    @bus.on(Placed, durable=Durable(attempts=1), name="mail")
    async def mail(event: Placed) -> None:
        async with scene.begun():
            bus.publish(Paid())

    @bus.on(Paid, durable=True, name="stock")
    async def stock(event: Paid) -> None: ...

    for depth in (2, 3):
        rows = [NewRow(uuid4(), "mail", None)]
        scene.table.insert(
            NewEvent(uuid4(), "shop.placed", '{"name": "bob"}', None, depth, PUBLISHED, rows)
        )
    report = await deep.run_due()
    assert report.handled == 2
    assert [type(failure.error) for failure in report.failures] == [EventDepthError]
    assert len(errors) == 1
    assert scene.kept() == {"mail": (State.DEAD, 1)}


async def test_what_a_log_line_is_bound_to_comes_back_in_a_run_from_a_row(
    scene: Scene, bus: EventBus
) -> None:
    bound: list[Mapping[str, Any]] = []
    writer, relay = scene.outbox(bus, relay=False), EventBus()

    for each in (bus, relay):

        @each.on(Placed, durable=True, name="mail")
        async def mail(event: Placed) -> None:
            bound.append(structlog.contextvars.get_contextvars())

    with structlog.contextvars.bound_contextvars(correlation_id="c-1", request_id=7, user="ada"):
        await keep(scene, bus, Placed())
    writer.detach()
    assert not bound
    await scene.outbox(relay).run_due()
    assert bound == [{"correlation_id": "c-1", "request_id": "7"}]
    assert not structlog.contextvars.get_contextvars()


trace: ContextVar[str] = ContextVar("trace", default="none")


class Tracer(Observer):
    def headers(self, event: object) -> Mapping[str, str]:
        return {"traceparent": trace.get()}

    def restored(self, headers: Mapping[str, str]) -> None:
        trace.set(headers["traceparent"])


class Broken(Observer):
    def headers(self, event: object) -> Mapping[str, str]:
        raise RuntimeError("no headers")

    def restored(self, headers: Mapping[str, str]) -> None:
        raise RuntimeError("no restoring")


async def test_observers_give_headers_and_get_them_back_and_one_that_fails_changes_nothing(
    scene: Scene, bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    relay = EventBus()
    scene.outbox(bus, relay=False)
    for each in (bus, relay):
        each.observe(Broken())
        each.observe(Tracer())

        @each.on(Placed, durable=True, name="mail")
        async def mail(event: Placed) -> None:
            seen.append(trace.get())

    token = trace.set("t-1")
    await keep(scene, bus, Placed())
    trace.reset(token)
    await scene.outbox(relay).run_due()
    assert seen == ["t-1"]
    assert trace.get() == "none"
    assert warned(caplog, "an observer failed") == 2


class Confusing(Observer):
    """One whose headers have the names of what a row keeps beside them."""

    def __init__(self) -> None:
        self.got: list[Mapping[str, str]] = []

    def headers(self, event: object) -> Mapping[str, str]:
        return {"carried": "c", "received": "r", "observed": "o"}

    def restored(self, headers: Mapping[str, str]) -> None:
        self.got.append(headers)


async def test_what_is_carried_goes_along_with_a_row_whatever_observers_give(
    scene: Scene, bus: EventBus
) -> None:
    seen: list[object] = []
    relay, observer = EventBus(), Confusing()
    scene.outbox(bus, relay=False)
    for each in (bus, relay):
        each.observe(observer)

        @each.on(Placed, durable=True, name="mail")
        async def mail(event: Placed) -> None:
            seen.append((event.name, {**carried.get()}, current_delivery().received))

    token = carried.set({"traceparent": "00-1"})
    await keep(scene, bus, Placed("ada"))
    carried.reset(token)
    await keep(scene, bus, Placed("bob"))
    scene.table.insert(event("mail", name="eve"))

    carried.set({"of": "who runs it"})
    await scene.outbox(relay).run_due()

    assert seen == [("ada", {"traceparent": "00-1"}, None), ("bob", {}, None), ("eve", {}, None)]
    assert observer.got == [{"carried": "c", "received": "r", "observed": "o"}] * 2 + [{}]


async def test_a_row_of_an_older_version_has_its_headers(scene: Scene, bus: EventBus) -> None:
    observer = Confusing()
    bus.observe(observer)

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        assert current_delivery().received is None
        assert carried.get() == {}

    (id_,) = scene.table.insert(event("mail"))
    scene.table.change(id_, """headers = '{{"carried": "c", "trace": "t"}}'""")
    report = await scene.outbox(bus).run_due()

    assert report.handled == 1
    assert observer.got == [{"carried": "c", "trace": "t"}]


@pytest.mark.parametrize("headers", ["nonsense", "7"])
async def test_a_row_whose_headers_cannot_be_read_holds_up_nobody(
    headers: str,
    scene: Scene,
    bus: EventBus,
    outbox: Outbox,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        seen.append(event.name)

    broken, _ = scene.table.insert(event("mail"), event("mail", name="bob"))
    scene.table.change(broken, f"headers = '{headers}', due_at = 1")
    await outbox.run_due()
    assert seen == ["bob"]
    ((state, attempt, owner),) = scene.table.rows().values()
    assert (state, attempt, owner) == (State.UNREADABLE, 0, None)
    assert warned(caplog, "a stored delivery cannot be read here") == 1


# What cannot be read


async def test_what_cannot_be_read_is_not_counted_and_not_tried_twice_by_run_due(
    scene: Scene, bus: EventBus, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(bus, "mail")
    gate.let_all_go()
    (id_,) = scene.table.insert(event("mail"))
    secret = "4929-secret"
    scene.table.change(id_, f'payload = \'{{{{"name": ["{secret}"]}}}}\'')
    with anyio.fail_after(30):
        report = await outbox.run_due(within=10_000)
    assert report.handled == 0
    assert scene.kept() == {"mail": (State.UNREADABLE, 0)}
    (row,) = await outbox.deliveries("unreadable")
    assert row.error is not None
    assert secret not in row.error
    assert secret not in caplog.text
    assert "mail" in caplog.text
    scene.table.change(id_, 'payload = \'{{"name": "bob"}}\', due_at = 1')
    await outbox.run_due()
    assert gate.ended == ["bob"]


async def test_a_key_is_not_held_up_by_what_is_dead_or_unreadable(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    seen: list[str] = []

    @bus.on(Placed, durable=Durable(attempts=2, key=lambda event: "one"), name="mail")
    async def mail(event: Placed) -> None:
        seen.append(event.name)
        if event.name == "b":
            raise ValueError

    ids = [id_ for name in "abc" for id_ in scene.table.insert(event("mail", name=name, key="one"))]
    scene.table.change(ids[0], "payload = '1'")
    await outbox.run_due()
    assert seen == ["b"]
    await outbox.run_due(within=10)
    assert seen == ["b", "b", "c"]
    assert {id_: state for id_, (state, *_) in scene.table.rows().items()} == {
        ids[0]: State.UNREADABLE,
        ids[1]: State.DEAD,
    }


async def test_a_subscription_that_is_cancelled_leaves_its_rows_to_who_knows_the_handler(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    blocker = Gate(bus, "blocker")

    async def handle(event: Placed) -> None: ...

    subscription = bus.subscribe(Placed, handle, durable=True, name="mail")
    scene.table.insert(event("blocker", "blocker", "blocker"), event("mail"))
    scene.table.sql("update {p}eventkit_outbox set due_at = 1 where handler = 'blocker'")
    async with relay_of(bus, outbox, concurrency=1) as relay:
        relay._source.most_held = lambda: 100  # type: ignore[method-assign]
        await look(relay)
        await until(lambda: blocker.begun)
        subscription.cancel()
        blocker.let_all_go()
        await until(lambda: bus.stats.requeued)
        await until(lambda: not bus.stats.running)
    assert scene.kept() == {"mail": (State.READY, 0)}


async def test_a_subscription_that_is_cancelled_during_the_claim_leaves_its_row_alone(
    scene: Scene, bus: EventBus, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handle(event: Placed) -> None: ...

    subscription = bus.subscribe(Placed, handle, durable=True, name="mail")
    store: Any = holdings_of(outbox).store
    real = store.claim

    def claim(*args: Any, **options: Any) -> Any:
        subscription.cancel()
        return real(*args, **options)

    monkeypatch.setattr(store, "claim", claim)
    scene.table.insert(event("mail"))
    await outbox.run_due()
    assert scene.kept() == {"mail": (State.UNREADABLE, 0)}


async def test_a_handler_that_takes_too_long_has_failed(scene: Scene) -> None:
    bus = EventBus(handler_timeout=0.01)
    bus.report_failure = ignore
    outbox = scene.outbox(bus)

    @bus.on(Placed, durable=Durable(attempts=2), name="mail")
    async def mail(event: Placed) -> None:
        await anyio.sleep_forever()

    @bus.on(Placed, durable=Durable(attempts=2), name="stock", timeout=0.01)
    async def stock(event: Placed) -> None:
        await anyio.sleep_forever()

    scene.table.insert(event("mail", "stock"))
    async with relaying(outbox):
        await until(lambda: bus.stats.failed == 2)
        await until(lambda: {*scene.kept().values()} == {(State.READY, 1)})
    for row in await outbox.deliveries("ready"):
        assert row.error is not None
        assert "Timeout" in row.error


async def test_what_a_handler_of_a_row_publishes_is_delivered_before_the_next_row(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    seen: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        seen.append(event.name)
        bus.publish(Paid(event.name))

    @bus.on(Paid)
    async def paid(event: Paid) -> None:
        seen.append(f"paid {event.name}")

    scene.table.insert(event("mail", name="a"), event("mail", name="b"))
    async with relay_of(bus, outbox, concurrency=1) as relay:
        relay._source.most_held = lambda: 100  # type: ignore[method-assign]
        await look(relay)
        await until(lambda: len(seen) == 4)
    assert seen in (["a", "paid a", "b", "paid b"], ["b", "paid b", "a", "paid a"])
    assert not scene.kept()
