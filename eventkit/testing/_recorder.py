"""Owns what is asked of published events: lists that explain, and a publisher that remembers."""

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
    """Events in their order: a list, equal to any list of equal events, that can be asked.

    `of` selects, `one`, `none` and `in_order` assert; where they fail, the message lists what
    there is instead, nearest match first. All match by type, subclasses included, and by keyword:
    a field's value has to be equal, and fields that are not named do not matter. What is equal,
    the expected value says: anything with an `==` of its own will do, dirty-equals for instance.

        placed = events.one(OrderPlaced, order_id=1)

    Each look at a recorder's events gives a list of its own, as of that moment.
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
        """What these events are called in messages: `published`, `handled` and so on."""
        return self._what

    def of(self, event_type: type[E2], /, **fields: object) -> EventList[E2]:
        """Those of a type, with these values in their fields, in order.

        Raises:
            TypeError: The type has no such field.
            InvalidEventTypeError: It is not a class.
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
        """The only one of a type, with these values in its fields.

        Raises:
            AssertionError: There is none, or there are several.
            TypeError: The type has no such field.
            InvalidEventTypeError: It is not a class.
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
        """Assert that there is none of a type, with these values in its fields.

        Raises:
            AssertionError: There are some.
            TypeError: The type has no such field.
            InvalidEventTypeError: It is not a class.
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
        """Assert that these are there in this order, whatever is before, between and after.

        Args:
            steps: Event types, or events that have to be equal.

        Returns:
            The events found, the earliest for each step.

        Raises:
            AssertionError: One is not there, or only before the one it should follow.
            TypeError: There are fewer than two steps.
        """
        __tracebackhide__ = True
        if len(steps) < 2:
            raise TypeError("in_order() takes two event types or more: in_order(First, Second)")
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
    """What can be asked of everything that records events; see `EventList`."""

    __slots__ = ()

    @property
    @abstractmethod
    def published(self) -> EventList[object]:
        """The events that were published, in order."""

    def of(self, event_type: type[E], /, **fields: object) -> EventList[E]:
        """Those published of a type, with these values in their fields. See `EventList.of`."""
        return self.published.of(event_type, **fields)

    def one(self, event_type: type[E], /, **fields: object) -> E:
        """The only one published of a type, with these values. See `EventList.one`."""
        __tracebackhide__ = True
        return self.published.one(event_type, **fields)

    def none(self, event_type: type = object, /, **fields: object) -> None:
        """Assert that none of a type was published, with these values. See `EventList.none`."""
        __tracebackhide__ = True
        self.published.none(event_type, **fields)

    @overload
    def in_order(self, first: type[A], second: type[B], /) -> tuple[A, B]: ...
    @overload
    def in_order(self, first: type[A], second: type[B], third: type[C], /) -> tuple[A, B, C]: ...
    @overload
    def in_order(self, *steps: object) -> tuple[object, ...]: ...
    def in_order(self, *steps: object) -> tuple[Any, ...]:  # Any: the overloads say it better
        """Assert that these were published in this order. See `EventList.in_order`."""
        __tracebackhide__ = True
        return self.published.in_order(*steps)


class EventRecorder(Recording):
    """A publisher that remembers: for tests of use cases alone, with no bus, loop or context.

        events = EventRecorder()
        CreateUser(events, users).execute("Ada", "ada@example.org")
        assert events.published == [UserCreated(1, "ada@example.org")]

    Nobody is called, and nothing is discarded: it knows no units of work. `EventCapture` does.
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
        """Those that are to be delivered although the unit of work fails, in order."""
        return EventList(self._even_on_failure, what="published even_on_failure")

    def publish(self, *events: object, even_on_failure: bool = False) -> None:
        """Remember that something happened. See `EventBus.publish`."""
        for event in events:
            refuse_non_event(event)
        self._published += events
        if even_on_failure:
            self._even_on_failure += events

    def clear(self) -> None:
        """Forget all events: for what a test has only to set the stage."""
        self._published.clear()
        self._even_on_failure.clear()

    def __repr__(self) -> str:
        return f"<EventRecorder, {len(self._published)} published>"
