"""Events: any object will do, and `DomainEvent` is an optional base."""

import dataclasses
import functools
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import pytest

from eventkit import DomainEvent, EventBus, EventContext, Publisher, current_delivery


@dataclass(frozen=True, slots=True)
class UserCreated(DomainEvent):
    """What users derive."""

    user_id: int
    email: str = ""


def test_a_subclass_adds_plain_positional_required_fields() -> None:
    event = UserCreated(1, "a@example.com")

    assert (event.user_id, event.email) == (1, "a@example.com")


def test_two_events_with_an_equal_payload_are_equal() -> None:
    assert UserCreated(1) == UserCreated(1)
    assert hash(UserCreated(1)) == hash(UserCreated(1))
    assert UserCreated(1) != UserCreated(2)
    assert UserCreated(1).event_id != UserCreated(1).event_id


def test_both_fields_are_generated_and_can_be_given_by_keyword_only() -> None:
    before = datetime.now(UTC)
    generated = UserCreated(1)
    given = UserCreated(1, event_id=UUID(int=7), occurred_at=before)

    assert isinstance(generated.event_id, UUID)
    assert generated.event_id.version == 4
    assert before <= generated.occurred_at <= datetime.now(UTC)
    assert generated.occurred_at.tzinfo is UTC
    assert (given.event_id.int, given.occurred_at) == (7, before)
    with pytest.raises(TypeError):
        UserCreated(1, "", UUID(int=7))  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


def test_domain_events_are_frozen_and_slotted() -> None:
    event = UserCreated(1)

    assert not hasattr(event, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.user_id = 2  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]


def test_a_bus_a_context_and_anything_with_publish_are_publishers() -> None:
    class Kept:
        def __init__(self) -> None:
            self.events: list[object] = []

        def publish(self, *events: object, even_on_failure: bool = False) -> None:
            self.events += events

    def use_case(events: Publisher) -> None:
        events.publish(UserCreated(1))

    kept, bus = Kept(), EventBus()
    use_case(kept)
    with bus.context() as unit:
        use_case(bus)
        use_case(unit)

    assert isinstance(unit, EventContext)
    assert kept.events == [UserCreated(1)]
    assert bus.stats.published == 2


def test_an_event_may_be_any_object() -> None:
    bus = EventBus()
    events: list[object] = [1, None, "text", {"a": 1}, [], object(), print, ValueError()]
    seen: list[object] = []
    bus.subscribe(object, seen.append, thread=False)

    with bus.context():
        bus.publish(*events)

    assert seen == events


class Plain:
    """An event with no id of its own."""


@pytest.mark.anyio
async def test_all_deliveries_of_one_publish_have_its_event_id_and_others_have_another() -> None:
    bus = EventBus()
    seen: dict[int, set[UUID]] = {}

    async def note(event: Plain) -> None:
        delivery = current_delivery()
        assert delivery.event_id != delivery.id
        seen.setdefault(id(event), set()).add(delivery.event_id)

    for _ in range(2):
        bus.subscribe(Plain, functools.partial(note))
    first, second = Plain(), Plain()
    async with bus.context():
        bus.publish(first, second)

    ids = [*seen[id(first)], *seen[id(second)]]
    assert len(ids) == len({*ids}) == 2


@pytest.mark.anyio
async def test_the_event_id_is_that_of_the_event_where_it_has_one() -> None:
    bus = EventBus()
    seen: list[UUID] = []

    @bus.on(UserCreated)
    async def note(event: UserCreated) -> None:
        seen.append(current_delivery().event_id)

    await bus.dispatch(UserCreated(1, event_id=UUID(int=7)))

    assert seen == [UUID(int=7)]
