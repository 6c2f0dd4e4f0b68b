"""Owns lists of events with assertions, and `EventRecorder`, a publisher that records events."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar, overload

from eventkit._core.subscriptions import check_event_type, refuse_non_event
from eventkit.testing._matching import (
    check_fields,
    describe,
    expectation,
    listed,
    matches,
    nearest_first,
)

E = TypeVar("E")
E2 = TypeVar("E2")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


class EventList(list[E], Generic[E]):
    """A list of events with methods that select and assert.

        placed = events.one(OrderPlaced, order_id=1)

    It is a `list`, and equal to every list of equal events. `of` selects events. `one`, `none` and
    `in_order` assert. If an assertion fails, its message lists the events that there are, the best
    match first.

    These methods match by type, including subclasses, and by keyword: a named field must have an
    equal value. The other fields do not matter. The comparison is `expected == value`, so an
    expected value may have its own `==`, as those of dirty-equals have.

    The lists of a recorder or capture do not change later: each access makes a new list.
    """

    __slots__ = ("_dropped", "_what")

    def __init__(
        self,
        events: Iterable[E] = (),
        /,
        *,
        what: str = "recorded",
        dropped: Iterable[object] = (),
    ) -> None:
        super().__init__(events)
        self._what = what
        self._dropped = list(dropped)

    @property
    def what(self) -> str:
        """Name of the list in messages: `published`, `handled` and so on."""
        return self._what

    def of(self, event_type: type[E2], /, **fields: object) -> EventList[E2]:
        """Return the events of a type whose fields have these values, in order.

        Args:
            event_type: A class; subclasses are included.
            fields: Values that fields of the events must have.

        Raises:
            TypeError: The type has no such field.
            InvalidEventTypeError: `event_type` is not a class.
        """
        __tracebackhide__ = True
        self._check(event_type, fields)
        found = [event for event in self if isinstance(event, event_type)]
        return EventList(
            [event for event in found if matches(event, event_type, fields)],
            what=self._what,
            dropped=self._dropped,
        )

    def one(self, event_type: type[E2], /, **fields: object) -> E2:
        """Assert that there is exactly one event of a type with these values, and return it.

        Args:
            event_type: A class; subclasses are included.
            fields: Values that fields of the event must have.

        Raises:
            AssertionError: There is no such event, or there are several.
            TypeError: The type has no such field.
            InvalidEventTypeError: `event_type` is not a class.
        """
        __tracebackhide__ = True
        found = self.of(event_type, **fields)
        if len(found) == 1:
            return found[0]
        wanted = expectation(event_type, fields)
        if found:
            head = f"expected one {wanted}, but {len(found)} were {self._what}:"
            raise AssertionError("\n".join([head, *listed(found)]))
        head = f"expected one {wanted}, but none was {self._what}"
        lines = [f"{head}, nor anything else"]
        if self:
            lines = [f"{head}; instead, nearest first:", *nearest_first(self, event_type, fields)]
        dropped = [event for event in self._dropped if matches(event, event_type, fields)]
        if dropped:
            lines += ["but discarded with its unit of work was:", *listed(dropped)]
        raise AssertionError("\n".join(lines))

    def none(self, event_type: type = object, /, **fields: object) -> None:
        """Assert that there is no event of a type with these values; by default, no event at all.

        Args:
            event_type: A class; subclasses are included.
            fields: Values that the fields of such an event would have.

        Raises:
            AssertionError: There are such events.
            TypeError: The type has no such field.
            InvalidEventTypeError: `event_type` is not a class.
        """
        __tracebackhide__ = True
        found: EventList[object] = self.of(event_type, **fields)
        if found:
            wanted = expectation(event_type, fields)
            head = f"expected no {wanted}, but {len(found)} {_were(found)} {self._what}:"
            raise AssertionError("\n".join([head, *listed(found)]))

    @overload
    def in_order(self, first: type[A], second: type[B], /) -> tuple[A, B]: ...
    @overload
    def in_order(self, first: type[A], second: type[B], third: type[C], /) -> tuple[A, B, C]: ...
    @overload
    def in_order(self, *steps: object) -> tuple[object, ...]: ...
    def in_order(self, *steps: object) -> tuple[Any, ...]:  # Any: the overloads say it better
        """Assert that these events occur in this order. Other events may be between them.

            placed, paid = events.in_order(OrderPlaced, OrderPaid)

        Args:
            steps: Event types, or events to compare with `==`. At least two.

        Returns:
            One event for each step: the earliest that follows the event of the step before.

        Raises:
            AssertionError: An event is missing, or is only before the event that it should follow.
            TypeError: There are fewer than two steps.
        """
        __tracebackhide__ = True
        if len(steps) < 2:
            raise TypeError("in_order() needs at least two event types: in_order(First, Second)")
        found: list[object] = []
        rest = iter(self)
        for step in steps:
            for event in rest:
                if isinstance(event, step) if isinstance(step, type) else event == step:
                    found.append(event)
                    break
            else:
                wanted = ", then ".join(map(_called, steps))
                after = f" after {describe(found[-1])}" if found else ""
                head = f"expected {wanted}, but no {_called(step)} was {self._what}{after}"
                lines = [f"{head}; in order:", *listed(self)] if self else [head]
                raise AssertionError("\n".join(lines))
        return tuple(found)

    def _check(self, event_type: type, fields: dict[str, object]) -> None:
        __tracebackhide__ = True
        check_event_type(event_type)
        check_fields(event_type, fields, [*self, *self._dropped])


def _called(step: object) -> str:
    return step.__qualname__ if isinstance(step, type) else describe(step)


def _were(found: Sequence[object]) -> str:
    return "was" if len(found) == 1 else "were"


class Recording(ABC):
    """Base class of everything that records events; see `EventList`."""

    __slots__ = ()

    @property
    @abstractmethod
    def published(self) -> EventList[object]:
        """The events that were published, in order."""

    def of(self, event_type: type[E], /, **fields: object) -> EventList[E]:
        """Return the published events of a type with these values. See `EventList.of`.

        Args:
            event_type: A class; subclasses are included.
            fields: Values that fields of the events must have.
        """
        return self.published.of(event_type, **fields)

    def one(self, event_type: type[E], /, **fields: object) -> E:
        """Assert that exactly one such event was published, and return it. See `EventList.one`.

        Args:
            event_type: A class; subclasses are included.
            fields: Values that fields of the event must have.
        """
        __tracebackhide__ = True
        return self.published.one(event_type, **fields)

    def none(self, event_type: type = object, /, **fields: object) -> None:
        """Assert that no such event was published. See `EventList.none`.

        Args:
            event_type: A class; subclasses are included.
            fields: Values that the fields of such an event would have.
        """
        __tracebackhide__ = True
        self.published.none(event_type, **fields)

    @overload
    def in_order(self, first: type[A], second: type[B], /) -> tuple[A, B]: ...
    @overload
    def in_order(self, first: type[A], second: type[B], third: type[C], /) -> tuple[A, B, C]: ...
    @overload
    def in_order(self, *steps: object) -> tuple[object, ...]: ...
    def in_order(self, *steps: object) -> tuple[Any, ...]:  # Any: the overloads say it better
        """Assert that these events were published in this order. See `EventList.in_order`.

        Args:
            steps: Event types, or events to compare with `==`. At least two.
        """
        __tracebackhide__ = True
        return self.published.in_order(*steps)


class EventRecorder(Recording):
    """A publisher that only records events, for unit tests without a bus, event loop or context.

        events = EventRecorder()
        CreateUser(events, users).execute("Ada", "ada@example.org")
        assert events.published == [UserCreated(1, "ada@example.org")]

    It calls no handler, has no units of work, and discards nothing. To test with a real bus, use
    `EventCapture`.
    """

    __slots__ = ("_even_on_failure", "_published")

    def __init__(self) -> None:
        self._published: list[object] = []
        self._even_on_failure: list[object] = []

    @property
    def published(self) -> EventList[object]:
        """All events, in order."""
        return EventList(self._published, what="published")

    @property
    def even_on_failure(self) -> EventList[object]:
        """The events that were published with `even_on_failure=True`, in order."""
        return EventList(self._even_on_failure, what="published even_on_failure")

    def publish(self, *events: object, even_on_failure: bool = False) -> None:
        """Record events. See `EventBus.publish`.

        Args:
            events: Instances of any class.
            even_on_failure: If True, the events are also in `even_on_failure`.

        Raises:
            InvalidEventTypeError: A class was given instead of an instance.
        """
        for event in events:
            refuse_non_event(event)
        self._published += events
        if even_on_failure:
            self._even_on_failure += events

    def clear(self) -> None:
        """Forget all events, for example after the test has prepared its data."""
        self._published.clear()
        self._even_on_failure.clear()

    def __repr__(self) -> str:
        return f"<EventRecorder, {len(self._published)} published>"
