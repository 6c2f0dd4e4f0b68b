"""Owns the hooks through which observers watch a bus, and logs the errors that they raise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Protocol

from eventkit._core.events import Delivery, type_name
from eventkit._core.log import log


class Observer:
    """Base class for objects that watch a bus: override hooks, then call `bus.observe(observer)`.

        class PrintFailures(Observer):
            @contextmanager
            def delivery(self, delivery: Delivery) -> Generator[None]:
                try:
                    yield
                except Exception as error:
                    print(delivery, error)
                    raise

        bus.observe(PrintFailures())

    The hooks of this class do nothing. A hook is called synchronously and should be quick. An
    exception from a hook is logged and has no other effect. `published` is called in the thread and
    the context variables of the publisher, and `delivery` in those of the handler. The other hooks
    are called where a unit of work decides about its events, or ends. If another thread publishes,
    its `published` may come after the first delivery has started. `observe` looks up once which
    hooks are overridden, so the other hooks cost nothing.
    """

    def published(self, event: object, deliveries: Sequence[Delivery]) -> None:
        """An event was accepted.

        Args:
            event: The event.
            deliveries: One for each handler. It is empty if the event has no handler.
        """

    def released(self, events: Sequence[object]) -> None:
        """A unit of work has decided that these events will be delivered, whatever follows.

        Called once for each event, also for an event without a handler, before its deliveries.

        Args:
            events: The events.
        """

    def withdrawn(self, events: Sequence[object]) -> None:
        """These events will not be delivered: their unit of work failed, or dropped them.

        Called once for each event, also for an event without a handler, before `discarded`.

        Args:
            events: The events.
        """

    def discarded(self, deliveries: Sequence[Delivery]) -> None:
        """These deliveries will not run: their unit failed, or their subscription was cancelled.

        Args:
            deliveries: The deliveries.
        """

    def undelivered(self, deliveries: Sequence[Delivery]) -> None:
        """These deliveries did not run, or were ended by a cancellation from outside.

        If a delivery was ended, its context manager from `delivery` was left before.

        Args:
            deliveries: The deliveries.
        """

    def requeued(self, deliveries: Sequence[Delivery]) -> None:
        """These deliveries did not run here, or were ended. An outbox runs them later.

        Args:
            deliveries: The deliveries.
        """

    def headers(self, event: object) -> Mapping[str, str]:
        """Return headers that travel with the event to other processes, such as a trace id.

        Called in `publish`, in the publisher's context variables, if an outbox stores the event for
        a durable handler, or if a bridge sends it to another service.

        Args:
            event: The event.
        """
        return {}

    def restored(self, headers: Mapping[str, str]) -> None:
        """Put back the headers that `headers` returned: a delivery is about to run from a table.

        Called in the delivery's context variables, before `delivery`.

        Args:
            headers: The stored headers. They are empty if none were stored.
        """

    def delivery(self, delivery: Delivery) -> AbstractContextManager[object]:
        """Return a context manager that surrounds one run of one handler.

        It is entered right before the handler, in the handler's own context variables. The handler
        sees what it sets, such as the current span of a tracer. Its `__exit__` gets the outcome: no
        exception if the handler succeeded, the handler's exception if it failed, and a cancellation
        if it was ended from outside. It cannot suppress the exception.

        Args:
            delivery: The delivery that is about to run.
        """
        return nullcontext()


class Named(Protocol):
    """The part of a handler that observers see."""

    @property
    def name(self) -> str:
        """Stable name of the handler."""
        ...


class Accepted(Protocol):
    """An event that was accepted.

    Attributes:
        event: The event.
    """

    event: object

    def deliveries(self) -> Sequence[Delivery]:
        """The deliveries for `Observer.published`."""
        ...


class Begun(Protocol):
    """An event whose handlers run. Each handler has an index.

    Attributes:
        event: The event.
    """

    event: object

    @property
    def handlers(self) -> Sequence[Named]:
        """The handlers of the event."""
        ...

    @property
    def received(self) -> Mapping[str, str] | None:
        """The value of `Delivery.received` for each of its deliveries."""
        ...

    def delivery(self, index: int) -> Delivery:
        """The delivery for `Observer.delivery`."""
        ...


class Insider(Observer):
    """An observer inside eventkit that makes a `Delivery` only when it needs one.

    A `Delivery` costs two microseconds. A run of a handler without observers costs twenty. The
    hooks `published` and `delivery` are never called; `accepted` and `surround` are called instead.
    The class is not an `ABC`, because `isinstance` with an `ABC` costs half a microsecond.
    """

    surround: Callable[[Begun, int], AbstractContextManager[object]]
    """As `delivery`, for a run of the handler at this index.

    Neither this method nor the context manager raises.
    """

    def accepted(self, accepted: Accepted) -> None:
        """As `published`, without the deliveries."""


class Observation:
    """The handle of an observer on a bus: `detach()` ends the observation.

        with bus.observe(observer):    # detached at the end of the block
            ...

    `EventBus.observe` returns it.
    """

    __slots__ = ("_detach",)

    def __init__(self, detach: Callable[[], None]) -> None:
        self._detach = [detach]  # a list: two threads at once must not both take it

    def detach(self) -> None:
        """Stop calling the hooks of the observer.

        Deliveries that run now still leave their context managers. Thread-safe. Calling it again
        has no effect.
        """
        with suppress(IndexError):
            self._detach.pop()()

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


class Audience:
    """The observers of one bus in the order of `observe`; for each hook, those that override it.

    A hook that no observer overrides is not called, and its arguments are not made.

    Attributes:
        everyone: All observers.
        watches_decisions: Whether an observer overrides `released` or `withdrawn`.
    """

    __slots__ = (
        "delivery",
        "discarded",
        "everyone",
        "headers",
        "published",
        "released",
        "requeued",
        "restored",
        "undelivered",
        "watches_decisions",
        "withdrawn",
    )

    def __init__(self, everyone: tuple[Observer, ...] = ()) -> None:
        self.everyone: tuple[Observer, ...] = everyone
        self.published: tuple[Observer, ...] = self._with("published", insiders=True)
        self.released: tuple[Observer, ...] = self._with("released")
        self.withdrawn: tuple[Observer, ...] = self._with("withdrawn")
        self.discarded: tuple[Observer, ...] = self._with("discarded")
        self.undelivered: tuple[Observer, ...] = self._with("undelivered")
        self.requeued: tuple[Observer, ...] = self._with("requeued")
        self.headers: tuple[Observer, ...] = self._with("headers")
        self.restored: tuple[Observer, ...] = self._with("restored")
        self.delivery: tuple[Observer, ...] = self._with("delivery", insiders=True)
        self.watches_decisions: bool = bool(self.released or self.withdrawn)

    def _with(self, hook: str, *, insiders: bool = False) -> tuple[Observer, ...]:
        """The observers that override a hook; with `insiders`, also all instances of `Insider`."""
        untouched = getattr(Observer, hook)
        return tuple(
            each
            for each in self.everyone
            if (insiders and isinstance(each, Insider))
            or getattr(getattr(each, hook), "__func__", None) is not untouched
        )

    @property
    def watches_events(self) -> bool:
        """Whether an observer needs to see also the events that have no handler."""
        return bool(self.published) or self.watches_decisions


NOBODY = Audience()


@contextmanager
def contained(observer: Observer) -> Generator[None]:
    """Log an exception of the observer, and go on.

    Only for hooks that are rarely called: the context manager costs a microsecond.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - an observer is user code
        complain(observer, error)


def complain(observer: Observer, error: Exception) -> None:
    """Log an exception of an observer."""
    log(logging.ERROR, "an observer failed", error=error, observer=type_name(type(observer)))


class _Surrounding:
    """The context manager of an observer around one delivery; logs exceptions of the observer."""

    __slots__ = ("_begun", "_index", "_manager", "_observer")

    def __init__(self, observer: Observer, begun: Begun, index: int) -> None:
        self._observer = observer
        self._begun = begun
        self._index = index
        self._manager: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        try:
            manager = self._observer.delivery(self._begun.delivery(self._index))
            manager.__enter__()
            self._manager = manager
        except Exception as error:  # noqa: BLE001 - an observer is user code
            complain(self._observer, error)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._manager is None:
            return
        try:
            self._manager.__exit__(exc_type, exc, traceback)
        except Exception as error:  # noqa: BLE001 - an observer is user code
            complain(self._observer, error)


def watched(
    observers: tuple[Observer, ...], begun: Begun, index: int
) -> AbstractContextManager[object]:
    """All observers' context managers around one delivery, the first observer outermost."""
    if not observers:
        return nullcontext()
    if len(observers) == 1:  # common with an outbox; an `ExitStack` costs more than all else here
        return _watched_by(observers[0], begun, index)
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(_watched_by(observer, begun, index))
        return stack.pop_all()


def _watched_by(observer: Observer, begun: Begun, index: int) -> AbstractContextManager[object]:
    if isinstance(observer, Insider):
        return observer.surround(begun, index)
    return _Surrounding(observer, begun, index)
