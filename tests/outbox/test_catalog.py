"""Names lead from rows to handlers and classes: today's, former ones, those of other deploys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from eventkit import Durable, EventBus, current_delivery, named
from eventkit.exceptions import DuplicateNameError, InvalidEventTypeError
from eventkit.outbox import Outbox
from eventkit.outbox._catalog import Catalog
from eventkit.outbox._store import State
from eventkit.wire import wire_name
from tests.outbox.processes import event, look, relay_of
from tests.outbox.scenes import Placed, Scene

pytestmark = pytest.mark.anyio


def from_v1(stored: dict[str, Any]) -> dict[str, Any]:
    return {"number": int(stored["no"]), "via": ["v1"]}


def from_v2(stored: dict[str, Any]) -> dict[str, Any]:
    return {**stored, "via": [*stored["via"], "v2"]}


@named("shop.shipped.v3", formerly={"shop.shipped.v2": from_v2})
@dataclass(frozen=True)
class Shipped:
    number: int
    via: list[str]


@named(
    "shop.sent.v3", formerly={"shop.sent.v1": from_v1, "shop.sent.v2": from_v2, "shop.sent": None}
)
@dataclass(frozen=True)
class Sent:
    number: int
    via: list[str]


@named("shop.above")
@dataclass(slots=True, frozen=True)
class Above:
    number: int


@dataclass(slots=True, frozen=True)
@named("shop.below")
class Below:
    number: int


@named("shop.newer")
@dataclass(frozen=True)
class Newer:
    name: str


@pytest.fixture
def seen(bus: EventBus) -> list[object]:
    return []


def handling(bus: EventBus, event_type: type, seen: list[object], **durable: Any) -> None:
    @bus.on(event_type, durable=Durable(**durable), name="mail")
    async def mail(event: Any) -> None:
        seen.append(event)


async def test_a_row_of_a_name_two_names_ago_goes_through_both_functions_in_order(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[object]
) -> None:
    handling(bus, Sent, seen)
    rows = {"shop.sent.v1": '{"no": "1"}', "shop.sent.v2": '{"number": 2, "via": []}'}
    for event_type, payload in rows.items():
        (id_,) = scene.table.insert(event("mail", event_type=event_type))
        scene.table.change(id_, f"payload = '{payload.replace('{', '{{').replace('}', '}}')}'")
    await outbox.run_due()
    assert sorted(seen, key=lambda each: each.number) == [  # type: ignore[attr-defined]
        Sent(1, ["v1", "v2"]),
        Sent(2, ["v2"]),
    ]
    assert not scene.table.rows()


async def test_a_former_function_that_fails_makes_the_row_unreadable(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[object]
) -> None:
    handling(bus, Sent, seen)
    scene.table.insert(event("mail", event_type="shop.sent.v1"))  # it has no "no"
    await outbox.run_due()
    assert scene.kept() == {"mail": (State.UNREADABLE, 0)}
    (row,) = await outbox.deliveries("unreadable")
    assert row.error is not None
    assert "KeyError" in row.error or "Error" in row.error


async def test_rows_of_a_handler_that_was_renamed_are_run_under_its_new_name(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    seen: list[str] = []

    @bus.on(Placed, durable=Durable(formerly=("post", "letter")), name="mail")
    async def mail(event: Placed) -> None:
        seen.append(f"{current_delivery().handler} {event.name}")

    scene.table.insert(event("post", name="a"), event("letter", name="b"), event("mail", name="c"))
    await outbox.run_due()
    assert sorted(seen) == ["mail a", "mail b", "mail c"]
    assert not scene.table.rows()


async def test_an_old_process_leaves_rows_of_newer_types_and_handlers_to_the_new_one(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[object]
) -> None:
    handling(bus, Placed, seen)
    new = EventBus()
    new_outbox = scene.outbox(new)
    both: list[object] = []
    handling(new, Placed, both)

    @new.on(Newer, durable=True, name="fresh")
    @new.on(Placed, durable=True, name="newer")
    async def newer(event: Newer | Placed) -> None:
        both.append(event)

    scene.table.insert(event("newer"), event("fresh", event_type="shop.newer"))
    before = scene.table.rows()
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        assert scene.table.rows() == before
    assert not seen
    await new_outbox.run_due()
    assert len(both) == 2


async def test_the_order_of_named_and_a_slotted_dataclass_does_not_matter(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[object]
) -> None:
    assert (wire_name(Above), wire_name(Below)) == ("shop.above", "shop.below")

    @bus.on(Above, durable=True, name="above")
    async def above(event: Above) -> None:
        seen.append(event)

    @bus.on(Below, durable=True, name="below")
    async def below(event: Below) -> None:
        seen.append(event)

    for event_type, handler in (("shop.above", "above"), ("shop.below", "below")):
        (id_,) = scene.table.insert(event(handler, event_type=event_type))
        scene.table.change(id_, "payload = '{{\"number\": 7}}'")
    await outbox.run_due()
    assert sorted(seen, key=str) == [Above(7), Below(7)]


async def test_what_is_subscribed_later_is_known_at_once(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[object]
) -> None:
    scene.table.insert(event("mail"))
    assert (await outbox.run_due()).handled == 0
    handling(bus, Placed, seen)
    assert (await outbox.run_due()).handled == 1
    assert seen == [Placed("ada")]


async def test_a_handler_that_takes_other_events_is_no_handler_of_a_row(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[object]
) -> None:
    handling(bus, Above, seen)

    @bus.on(Placed, durable=True, name="stock")
    async def stock(event: Placed) -> None: ...

    scene.table.insert(event("mail"))  # a `Placed`
    await outbox.run_due(within=10_000)
    assert scene.kept() == {"mail": (State.UNREADABLE, 0)}
    assert not seen


def test_a_catalog_knows_names_and_nothing_that_is_not_durable(bus: EventBus) -> None:
    catalog = Catalog(bus)

    @bus.on(Shipped)
    async def memory(event: Shipped) -> None: ...

    assert catalog.known() == ((), ())
    assert catalog.codec("shop.shipped.v3") is None
    assert catalog.handler("mail", Shipped) is None
    handling(bus, Shipped, [], formerly=("post",))
    assert catalog.known() == (("mail", "post"), ("shop.shipped.v3", "shop.shipped.v2"))
    assert catalog.codec("shop.shipped.v2") is not None
    assert catalog.handler("post", Shipped) is not None
    assert catalog.handler("post", Placed) is None
    assert catalog.handler("letter", Shipped) is None


def test_what_cannot_be_stored_is_refused_before_and_after_the_outbox(scene: Scene) -> None:
    class Local:
        pass

    early, late = EventBus(), EventBus()
    with pytest.raises(InvalidEventTypeError):
        handling(late_with_outbox(late, scene.outbox), Local, [])

    handling(early, Local, [])
    with pytest.raises(InvalidEventTypeError):
        scene.outbox(early)


def late_with_outbox(bus: EventBus, outbox: Callable[[EventBus], Outbox]) -> EventBus:
    outbox(bus)
    return bus


def test_two_durable_handlers_of_one_name_are_refused(bus: EventBus) -> None:
    handling(bus, Placed, [])
    with pytest.raises(DuplicateNameError):
        handling(bus, Placed, [])
