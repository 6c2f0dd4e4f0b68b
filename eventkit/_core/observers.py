"""Owns the hooks through which others watch a bus, and keeps their errors away from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Protocol

from eventkit._core.events import Delivery, type_name
from eventkit._core.log import log


class Observer:
    """A no-op base class: override what you want to see, then `bus.observe(observer)`.

    Hooks are called synchronously and should be quick; what one raises is logged and changes
    nothing. `published` is called in the publisher's thread and context variables, `delivery` in
    the handler's, and the others wherever a unit of work decides about its events or ends. A
    publish from another thread may be told after its first delivery has started. Which hooks are
    overridden is looked up once, in `observe`: the others cost nothing.
    """

    def published(self, event: object, deliveries: Sequence[Delivery]) -> None:
        """An event was accepted; `deliveries` is empty where it has no handler."""

    def released(self, events: Sequence[object]) -> None:
        """These will be delivered, whatever follows: their unit of work has decided.

        Told of each event, also of those without a handler, once, and before its deliveries.
        """

    def withdrawn(self, events: Sequence[object]) -> None:
        """These will not be delivered: their unit of work failed, or dropped them.

        Told of each event, also of those without a handler, once, and before `discarded`.
        """

    def discarded(self, deliveries: Sequence[Delivery]) -> None:
        """These will not run: their unit of work failed, or their subscription was cancelled."""

    def undelivered(self, deliveries: Sequence[Delivery]) -> None:
        """These were not run, or were ended by a cancellation from outside.

        Of those that were ended, the context manager of `delivery` was told before.
        """

    def requeued(self, deliveries: Sequence[Delivery]) -> None:
        """These were not run here, or were ended: an outbox keeps them, and runs them later."""

    def headers(self, event: object) -> Mapping[str, str]:
        """What of the caller's context variables goes along with the event, to other processes.

        A trace id, for example. Called in `publish` where an outbox keeps the event for a durable
        handler, and where a bridge sends it to another service.
        """
        return {}

    def restored(self, headers: Mapping[str, str]) -> None:
        """A delivery is going to run from a table: put back what `headers` gave at publish.

        Called in the delivery's context variables, before `delivery`. `headers` is empty where
        nothing was kept.
        """

    def delivery(self, delivery: Delivery) -> AbstractContextManager[object]:
        """Surround one run of one handler.

        The context manager is entered right before the handler, in the handler's own context
        variables: what it sets is visible to the handler, a tracer's current span for instance.
        Its `__exit__` is told the outcome: nothing where the handler ended well, the exception
        where it failed, a cancellation where it was ended from outside. It cannot swallow it.
        """
        return nullcontext()


class Named(Protocol):
    """A handler, as far as observers see it."""

    @property
    def name(self) -> str:
        """Its stable name."""
        ...


class Accepted(Protocol):
    """An event that was accepted.

    Attributes:
        event: Which one.
    """

    event: object

    def deliveries(self) -> Sequence[Delivery]:
        """What `Observer.published` is told."""
        ...


class Begun(Protocol):
    """An event whose handlers run, each known by its index.

    Attributes:
        event: Which one.
    """

    event: object

    @property
    def handlers(self) -> Sequence[Named]:
        """Whom it is delivered to."""
        ...

    @property
    def received(self) -> Mapping[str, str] | None:
        """What `Delivery.received` is of each of its deliveries."""
        ...

    def delivery(self, index: int) -> Delivery:
        """What `Observer.delivery` is told."""
        ...


class Insider(Observer):
    """An observer of the house, which has a `Delivery` made only where it needs one.

    Making it costs two microseconds, and a run of a handler without anybody who watches twenty. Its
    hooks `published` and `delivery` are never called: it has these instead. Not an `ABC`, whose
    `isinstance` costs half a microsecond.
    """

    surround: Callable[[Begun, int], AbstractContextManager[object]]
    """What `delivery` gives for a run of the handler at this index.

    Neither this nor the context manager raises.
    """

    def accepted(self, accepted: Accepted) -> None:
        """What `published` is told of an event."""


class Observation:
    """The tie between a bus and an observer; `detach()` ends it. Also a context manager."""

    __slots__ = ("_detach",)

    def __init__(self, detach: Callable[[], None]) -> None:
        self._detach = [detach]  # taken out in one step, because threads may want it at once

    def detach(self) -> None:
        """Stop telling the observer. Deliveries that are running still tell it their end.

        From any thread, and as often as you like.
        """
        with suppress(IndexError):
            self._detach.pop()()

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


class Audience:
    """The observers of one bus, in the order in which they came, and by hook those that have it.

    A hook that an observer has left as it is, is not called, and what it would be told is not made.

    Attributes:
        everyone: All of them.
        watches_decisions: Whether somebody is told which events are released and withdrawn, also
            of those that have no handler.
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
        """Those that have a hook; with `insiders` these, too, which have another in its place."""
        untouched = getattr(Observer, hook)
        return tuple(
            each
            for each in self.everyone
            if (insiders and isinstance(each, Insider))
            or getattr(getattr(each, hook), "__func__", None) is not untouched
        )

    @property
    def watches_events(self) -> bool:
        """Whether somebody is told of events that have no handler, too."""
        return bool(self.published) or self.watches_decisions


NOBODY = Audience()


@contextmanager
def contained(observer: Observer) -> Generator[None]:
    """Log what the observer raises, and go on.

    For hooks that are called seldom: it costs a microsecond.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - an observer is user code
        complain(observer, error)


def complain(observer: Observer, error: Exception) -> None:
    """Log what an observer has raised."""
    log(logging.ERROR, "an observer failed", error=error, observer=type_name(type(observer)))


class _Surrounding:
    """An observer's context manager around one delivery, with its errors contained."""

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
    if len(observers) == 1:  # often it is an outbox's, and a stack costs more than all else here
        return _watched_by(observers[0], begun, index)
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(_watched_by(observer, begun, index))
        return stack.pop_all()


def _watched_by(observer: Observer, begun: Begun, index: int) -> AbstractContextManager[object]:
    if isinstance(observer, Insider):
        return observer.surround(begun, index)
    return _Surrounding(observer, begun, index)
