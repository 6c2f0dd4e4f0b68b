"""Lists of events that can be asked, a publisher that remembers, and what failing answers say."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import attrs
import pydantic
import pytest
from dirty_equals import IsPositiveInt, IsStr

from eventkit import DomainEvent, Publisher
from eventkit.exceptions import InvalidEventTypeError
from eventkit.testing import EventList, EventRecorder, explain


@dataclass(frozen=True, slots=True)
class OrderPlaced(DomainEvent):
    order_id: int
    email: str = "ada@example.org"


@dataclass(frozen=True, slots=True)
class GiftPlaced(OrderPlaced):
    wish: str = ""


@dataclass(frozen=True, slots=True)
class OrderPaid(DomainEvent):
    order_id: int


class Plain:
    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"Plain({self.number})"


class Model(pydantic.BaseModel):
    number: int
    text: str = ""


@attrs.frozen
class Attrs:
    number: int
    text: str = ""
    note: str = attrs.field(default="", eq=False)


class Tuple(NamedTuple):
    number: int
    text: str = ""


@dataclass
class Data:
    number: int
    text: str = ""


@pytest.fixture
def events() -> EventList[object]:
    return EventList([OrderPlaced(1), OrderPaid(1), GiftPlaced(2, wish="tea")], what="published")


def message(call: Callable[[], object], error: type[Exception] = AssertionError) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_a_use_case_alone_needs_a_recorder_and_one_assertion() -> None:
    class PlaceOrder:
        def __init__(self, events: Publisher) -> None:
            self._events = events

        def execute(self) -> None:
            self._events.publish(OrderPlaced(1))
            self._events.publish(OrderPaid(1), even_on_failure=True)

    recorder = EventRecorder()
    PlaceOrder(recorder).execute()

    assert recorder.published == [OrderPlaced(1), OrderPaid(1)]
    assert recorder.even_on_failure == [OrderPaid(1)]
    assert recorder.one(OrderPlaced, order_id=1) is recorder.published[0]
    assert recorder.of(DomainEvent) == recorder.published
    assert recorder.in_order(OrderPlaced, OrderPaid) == tuple(recorder.published)
    recorder.none(GiftPlaced)
    assert repr(recorder) == "<EventRecorder, 2 published>"
    recorder.clear()
    assert recorder.published == recorder.even_on_failure == []


def test_a_recorder_refuses_a_class_as_the_bus_does() -> None:
    recorder = EventRecorder()

    assert "not a class" in message(lambda: recorder.publish(OrderPlaced), InvalidEventTypeError)
    assert recorder.published == []


def test_each_look_at_a_recorder_is_a_list_of_its_own() -> None:
    recorder = EventRecorder()
    before = recorder.published
    recorder.publish(OrderPaid(1))

    assert before == []
    assert recorder.published == [OrderPaid(1)]


def test_events_are_selected_by_type_and_by_the_values_of_fields(
    events: EventList[object],
) -> None:
    assert events.of(OrderPlaced) == [OrderPlaced(1), GiftPlaced(2, wish="tea")]
    assert events.of(OrderPlaced, order_id=2) == [GiftPlaced(2, wish="tea")]
    assert events.of(OrderPlaced, wish="tea").of(OrderPlaced, order_id=2) == events.of(GiftPlaced)
    assert events.of(DomainEvent, order_id=1) == [OrderPlaced(1), OrderPaid(1)]
    assert events.of(Plain) == []


def struct() -> type:
    """Make a class of msgspec's, which is compiled: a new Python may be without it."""
    msgspec = pytest.importorskip("msgspec")
    fields = [("number", int), ("text", str, "")]
    struct: type = msgspec.defstruct("Struct", fields, frozen=True)
    return struct


@pytest.fixture(params=[Model, Attrs, struct, Tuple, Data], ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Any:
    """A class of each kind, with a number and a text."""
    return request.param() if request.param is struct else request.param


def test_fields_of_every_kind_of_class_match(kind: Any) -> None:
    events = EventList([kind(number=1, text="a"), kind(number=2, text="b")])

    assert events.one(kind, text="b") == kind(number=2, text="b")
    assert events.one(kind, number=IsPositiveInt(), text=IsStr(regex="a+")) is events[0]
    text = message(lambda: events.one(kind, numbr=1), TypeError)
    assert text == f"{kind.__name__} has no field 'numbr'. Did you mean 'number'?"
    assert message(lambda: EventList[object]().of(kind, colour=1), TypeError) == (
        f"{kind.__name__} has no field 'colour'. It has number, text"
    )
    assert explain("==", events, [kind(number=1, text="a"), kind(number=3, text="b")]) == [
        "recorded == expected, but for 1 different (~)",
        "  (1 as expected)",
        f"~ {events[1]!r}",
        "    number is 2, expected 3",
    ]


def test_a_plain_class_has_the_fields_that_its_instances_have() -> None:
    events = EventList([Plain(1)])

    assert events.of(Plain, number=1) == events
    assert EventList[object]().of(Plain, anything=1) == []
    assert EventList[object]().of(Data, number=1) == []
    assert message(lambda: events.of(Plain, numbr=1), TypeError) == (
        "Plain has no field 'numbr'. Did you mean 'number'?"
    )


def test_properties_count_as_fields() -> None:
    class Shouting(Plain):
        @property
        def loud(self) -> str:
            return "!" * self.number

    shouting = EventList([Shouting(1), Shouting(2)])

    assert shouting.one(Plain, loud="!!").number == 2
    assert shouting.of(Shouting, loud="?") == []


def test_exactly_one_is_asked_for_and_the_rest_is_listed_nearest_first(
    events: EventList[object],
) -> None:
    assert events.one(OrderPaid) == OrderPaid(1)
    assert message(lambda: events.one(OrderPlaced, order_id=3, email="ada@example.org")) == (
        "expected one OrderPlaced(order_id=3, email='ada@example.org'), but none was published; "
        "instead, nearest first:\n"
        "  OrderPlaced(order_id=1, email='ada@example.org')\n"
        "    order_id is 1, not 3\n"
        "  GiftPlaced(order_id=2, email='ada@example.org', wish='tea')\n"
        "    order_id is 2, not 3\n"
        "  OrderPaid(order_id=1)"
    )
    assert message(lambda: events.one(OrderPlaced, wish="tea", order_id=1)) == (
        "expected one OrderPlaced(wish='tea', order_id=1), but none was published; "
        "instead, nearest first:\n"
        "  OrderPlaced(order_id=1, email='ada@example.org')\n"
        "    wish is not there, not 'tea'\n"
        "  GiftPlaced(order_id=2, email='ada@example.org', wish='tea')\n"
        "    order_id is 2, not 1\n"
        "  OrderPaid(order_id=1)"
    )
    assert message(lambda: events.one(OrderPlaced)) == (
        "expected one OrderPlaced, but 2 were published:\n"
        "  OrderPlaced(order_id=1, email='ada@example.org')\n"
        "  GiftPlaced(order_id=2, email='ada@example.org', wish='tea')"
    )
    assert message(lambda: EventList[object]().one(OrderPlaced)) == (
        "expected one OrderPlaced, but none was recorded, nor anything else"
    )


def test_that_there_is_none_is_asserted_too(events: EventList[object]) -> None:
    events.none(OrderPlaced, order_id=4)
    events.none(Plain)
    EventList[object]().none()

    assert message(lambda: events.none(OrderPaid)) == (
        "expected no OrderPaid, but 1 was published:\n  OrderPaid(order_id=1)"
    )
    assert message(events.none).startswith("expected no object, but 3 were published:\n")


def test_an_order_is_asserted_whatever_is_in_between(events: EventList[object]) -> None:
    assert events.in_order(OrderPlaced, GiftPlaced) == (events[0], events[2])
    assert events.in_order(OrderPlaced(1), OrderPaid, OrderPlaced) == tuple(events)

    assert message(lambda: events.in_order(OrderPaid, OrderPlaced(1))) == (
        "expected OrderPaid, then OrderPlaced(order_id=1, email='ada@example.org'), but no "
        "OrderPlaced(order_id=1, email='ada@example.org') was published after "
        "OrderPaid(order_id=1); in order:\n"
        "  OrderPlaced(order_id=1, email='ada@example.org')\n"
        "  OrderPaid(order_id=1)\n"
        "  GiftPlaced(order_id=2, email='ada@example.org', wish='tea')"
    )
    assert message(lambda: EventList[object]().in_order(OrderPaid, OrderPlaced)) == (
        "expected OrderPaid, then OrderPlaced, but no OrderPaid was recorded"
    )
    assert "in_order(First, Second)" in message(lambda: events.in_order(OrderPaid), TypeError)


def test_one_event_is_not_two_steps() -> None:
    once = EventList([OrderPaid(1)])

    assert "no OrderPaid was recorded after" in message(lambda: once.in_order(OrderPaid, OrderPaid))


def test_what_is_no_class_is_refused(events: EventList[object]) -> None:
    text = message(lambda: events.of(OrderPaid(1)), InvalidEventTypeError)  # type: ignore[arg-type]

    assert "Give its class: OrderPaid" in text


def test_long_lists_and_long_events_are_cut_short() -> None:
    many = EventList([OrderPaid(number) for number in range(30)])
    text = message(lambda: many.none(OrderPaid))
    assert text.endswith("\n  ... and 20 more")
    assert message(lambda: many.one(OrderPlaced)).endswith("\n  ... and 20 more")

    long = EventList([OrderPlaced(1, email="x" * 10_000)])
    assert len(message(lambda: long.none(OrderPlaced))) < 400


def test_a_comparison_says_what_is_missing_extra_and_different(events: EventList[object]) -> None:
    expected = [OrderPaid(7), OrderPlaced(1, "bob@example.org"), Plain(1)]

    assert explain("==", events, expected) == [
        "published == expected, but for 2 missing (-), 2 not expected (+), 1 different (~)",
        "- OrderPaid(order_id=7)",
        "~ OrderPlaced(order_id=1, email='ada@example.org')",
        "    email is 'ada@example.org', expected 'bob@example.org'",
        "+ OrderPaid(order_id=1)",
        "+ GiftPlaced(order_id=2, email='ada@example.org', wish='tea')",
        "- Plain(1)",
    ]


def test_a_comparison_explains_the_other_way_round_too(events: EventList[object]) -> None:
    found = explain("==", [OrderPlaced(1), OrderPaid(1)], events)

    assert found == [
        "published == expected, but for 1 not expected (+)",
        "  (2 as expected)",
        "+ GiftPlaced(order_id=2, email='ada@example.org', wish='tea')",
    ]


def test_the_longest_common_part_is_kept_and_the_rest_explained() -> None:
    found = EventList([OrderPaid(1), OrderPaid(2), OrderPaid(3), OrderPaid(4)])

    assert explain("==", found, [OrderPaid(2), OrderPaid(9), OrderPaid(3), OrderPaid(4)]) == [
        "recorded == expected, but for 1 missing (-), 1 not expected (+)",
        "+ OrderPaid(order_id=1)",
        "  (1 as expected)",
        "- OrderPaid(order_id=9)",
        "  (2 as expected)",
    ]
    assert explain("==", found, [OrderPaid(1), OrderPaid(3), OrderPaid(4)]) == [
        "recorded == expected, but for 1 not expected (+)",
        "  (1 as expected)",
        "+ OrderPaid(order_id=2)",
        "  (2 as expected)",
    ]


def test_two_thousand_events_are_compared_place_by_place() -> None:
    found = EventList([OrderPaid(number) for number in range(2000)])
    expected = [OrderPaid(0), *found[1:1999], OrderPaid(7)]

    assert explain("==", found, expected) == [
        "recorded == expected, but for 1 different (~)",
        "  (1999 as expected)",
        "~ OrderPaid(order_id=1999)",
        "    order_id is 1999, expected 7",
    ]


def test_classes_that_compare_by_identity_are_told_so() -> None:
    assert explain("==", EventList([Plain(1)]), [Plain(1)]) == [
        "recorded == expected, but for 1 different (~)",
        "~ Plain(1)",
        "    Plain is compared by identity: make it a dataclass, or define __eq__",
    ]


def test_a_difference_without_a_field_shows_what_was_expected() -> None:
    assert explain("==", EventList(["paid"]), ["sent"]) == [
        "recorded == expected, but for 1 different (~)",
        "~ 'paid'",
        "    expected 'sent'",
    ]


def test_what_is_not_in_a_list_is_told_with_its_neighbours(events: EventList[object]) -> None:
    assert explain("in", OrderPaid(3), events) == [
        "OrderPaid(order_id=3) in published, but these are, nearest first:",
        "  OrderPaid(order_id=1)",
        "    order_id is 1, not 3",
        "  OrderPlaced(order_id=1, email='ada@example.org')",
        "  GiftPlaced(order_id=2, email='ada@example.org', wish='tea')",
    ]
    assert explain("in", OrderPaid(3), EventList[object]()) == [
        "OrderPaid(order_id=3) in recorded, but nothing is"
    ]


def test_other_comparisons_are_left_to_the_test_runner(events: EventList[object]) -> None:
    assert explain("==", [1], [2]) is None
    assert explain("==", events, ()) is None
    assert explain("!=", events, []) is None
    assert explain("not in", OrderPaid(1), events) is None


def test_an_own_repr_is_shown_as_it_is() -> None:
    @dataclass
    class Secret:
        word: str

        def __repr__(self) -> str:
            return "Secret(***)"

    assert message(lambda: EventList([Secret("x")]).none(Secret)).endswith("\n  Secret(***)")


class Detached(Exception):
    """What a mapped object raises that its session has forgotten."""


class Mapped:
    """Its attributes cannot be read any more, and so it cannot be shown or compared."""

    def __repr__(self) -> str:
        raise Detached("not bound to a session")

    def __getattr__(self, name: str) -> object:
        raise Detached("not bound to a session")

    def __eq__(self, other: object) -> bool:
        raise Detached("not bound to a session")

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class UserMapped(DomainEvent):
    user: object
    number: int = 1


@dataclass
class Expired:
    """A dataclass one of whose fields cannot be read."""

    number: int

    def __getattribute__(self, name: str) -> object:
        if name == "number":
            raise Detached("not bound to a session")
        return object.__getattribute__(self, name)


SHOWN = "<Mapped whose repr raised Detached>"
EXPIRED = "Expired(number=<not readable, it raised Detached>)"


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        (Mapped(), SHOWN),
        (UserMapped(Mapped()), f"UserMapped(user={SHOWN}, number=1)"),
        (Expired(1), EXPIRED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_event_that_cannot_be_shown_hides_no_message(event: object, shown: str) -> None:
    events = EventList([event, Plain(1)], what="published")

    for text in (
        message(lambda: events.one(OrderPlaced)),
        message(lambda: events.one(OrderPlaced, order_id=1)),
        message(lambda: events.one(Plain, number=2)),
        message(events.none),
        message(lambda: events.in_order(Plain, OrderPlaced)),
        "\n".join(explain("in", OrderPlaced(1), events) or ()),
    ):
        assert f"\n  {shown}" in text
    assert f"\n+ {shown}" in "\n".join(explain("==", events, [Plain(2)]) or ())
    assert f"\n- {shown}" in "\n".join(explain("==", EventList([Plain(2)]), [event]) or ())
    assert f"expected one {type(event).__qualname__}(number={SHOWN})" in message(
        lambda: EventList[object]().one(type(event), number=Mapped())
    )


def test_two_events_that_cannot_be_compared_are_different() -> None:
    assert explain("==", EventList([UserMapped(Mapped())]), [UserMapped(Mapped())]) == [
        "recorded == expected, but for 1 different (~)",
        f"~ UserMapped(user={SHOWN}, number=1)",
        f"    user is {SHOWN}, expected {SHOWN}",
    ]
    assert explain("==", EventList([Expired(1)]), [Expired(1)]) == [
        "recorded == expected, but for 1 different (~)",
        f"~ {EXPIRED}",
        "    number is <not readable, it raised Detached>, expected <not readable, it raised "
        "Detached>",
    ]


def test_a_field_that_cannot_be_read_makes_no_assertion_hold() -> None:
    with pytest.raises(Detached):
        EventList([Expired(1)]).none(Expired, number=1)
    with pytest.raises(Detached):
        EventList([UserMapped(Mapped())]).none(UserMapped, user=1)


def test_a_field_that_was_never_set_is_shown_as_such() -> None:
    @dataclass
    class Unset:
        number: int = field(init=False)

    assert message(EventList([Unset()]).none).endswith("Unset(number=<not there>)")
