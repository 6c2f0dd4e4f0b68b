"""Owns the hooks through which others watch a bus, and keeps their errors away from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from types import TracebackType

from eventkit._core.events import Delivery, type_name
from eventkit._core.log import log


class Observer:
    """A no-op base class: override what you want to see, then `bus.observe(observer)`.

    Hooks are called synchronously and should be quick; what one raises is logged and changes
    nothing. `published` is called in the publisher's thread and context variables, `delivery` in
    the handler's, and the others wherever a unit of work decides about its events or ends. A
    publish from another thread may be told after its first delivery has started.
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

        Called in the delivery's context variables, before `delivery`.
        """

    def delivery(self, delivery: Delivery) -> AbstractContextManager[object]:
        """Surround one run of one handler.

        The context manager is entered right before the handler, in the handler's own context
        variables: what it sets is visible to the handler, a tracer's current span for instance.
        Its `__exit__` is told the outcome: nothing where the handler ended well, the exception
        where it failed, a cancellation where it was ended from outside. It cannot swallow it.
        """
        return nullcontext()


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


@contextmanager
def contained(observer: Observer) -> Generator[None]:
    """Log what the observer raises, and go on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - an observer is user code
        log(logging.ERROR, "an observer failed", error=error, observer=type_name(type(observer)))


class _Surrounding:
    """An observer's context manager around one delivery, with its errors contained."""

    __slots__ = ("_delivery", "_manager", "_observer")

    def __init__(self, observer: Observer, delivery: Delivery) -> None:
        self._observer = observer
        self._delivery = delivery
        self._manager: AbstractContextManager[object] = nullcontext()

    def __enter__(self) -> None:
        with contained(self._observer):
            manager = self._observer.delivery(self._delivery)
            manager.__enter__()
            self._manager = manager

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contained(self._observer):
            self._manager.__exit__(exc_type, exc, traceback)


def watched(observers: tuple[Observer, ...], delivery: Delivery) -> AbstractContextManager[object]:
    """All observers' context managers around one delivery, the first observer outermost."""
    if not observers:
        return nullcontext()
    if len(observers) == 1:  # often it is an outbox's, and a stack costs more than all else here
        return _Surrounding(observers[0], delivery)
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(_Surrounding(observer, delivery))
        return stack.pop_all()
