"""Owns the context variables: in which unit of work the calling code is, and in which delivery.

Knows of a unit of work only what it asks it, and makes none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, ContextVar
from types import MappingProxyType
from typing import Any, Protocol, cast

from eventkit._core.dispatch import Turn
from eventkit._core.events import Delivery, type_name
from eventkit._core.log import bind, binds
from eventkit._core.loops.running import library, on_event_loop
from eventkit._core.loops.threads import in_worker_thread
from eventkit._core.queue import State
from eventkit._core.state import BusState
from eventkit._core.threads import thread_level
from eventkit.exceptions import NoDeliveryError


class Surrounding(Protocol):
    """A unit of work, as far as it is looked at from inside.

    Attributes:
        state: What the units of its bus share.
        delivery: The delivery that it is, or that it is inside.
        is_delivery: Whether it is one.
    """

    state: BusState
    delivery: Delivery | None
    is_delivery: bool

    @property
    def closed(self) -> bool:
        """Whether it takes no more events."""
        ...

    @property
    def around(self) -> Surrounding | None:
        """The unit around it, of whichever bus; a delivery is inside of nothing."""
        ...


# What the caller is in: a unit, or the delivery of a turn, whose unit is made when it is asked for.
# Any: a unit, which knows more than `Surrounding` for those who put it here.
active: ContextVar[Any] = ContextVar("eventkit_active", default=None)
origin: ContextVar[object] = ContextVar("eventkit_origin", default=None)
_outside: ContextVar[str | None] = ContextVar("eventkit_outside", default=None)
# The buses whose units deliver their events themselves here, whatever `background` they ask for.
waiting: ContextVar[frozenset[BusState]] = ContextVar("eventkit_waiting", default=frozenset())

# Headers that go along with everything a unit of work publishes, also to other processes: a trace,
# for instance. A consumer sets them from its message; what its handlers publish inherits them.
NOTHING_CARRIED: Mapping[str, str] = MappingProxyType({})
carried: ContextVar[Mapping[str, str]] = ContextVar("eventkit_carried", default=NOTHING_CARRIED)


def current() -> Any:  # Any: as above; None outside of all
    """The unit of work that surrounds the caller, open or not."""
    found = active.get()
    if isinstance(found, tuple):
        turn, index = cast("tuple[Any, int]", found)  # Any: the turn, as above
        return turn.unit(index)
    return found


def outward(innermost: Any) -> Iterator[Any]:  # Any: as above
    """The unit, the one around it, and so on."""
    while innermost is not None:
        yield innermost
        innermost = innermost.around


def find(innermost: Any, state: BusState) -> Any:  # Any: as above; None where there is none
    """The innermost unit of this bus."""
    return next((unit for unit in outward(innermost) if unit.state is state), None)


def surrounding() -> Any:  # Any: as above
    """The unit of work, of whichever bus, that surrounds the caller; None if it is not open."""
    unit = current()
    return None if unit is None or unit.closed else unit


def running() -> Delivery | None:
    """The delivery that the caller is part of, whichever unit of work it publishes to."""
    unit: Surrounding | None = surrounding()
    return None if unit is None else unit.delivery


def delivering() -> dict[object, Any]:  # Any: as above
    """The bus whose handler the caller is part of, with the unit of work that the delivery is."""
    unit = current()
    return {} if unit is None or not unit.is_delivery else {unit.state.bus: unit}


def current_delivery() -> Delivery:
    """The delivery that the calling handler is.

    Its `id` is fit for an idempotency key. Seen by everything that shares the handler's context
    variables: the functions it calls, its threads and tasks.

    Raises:
        NoDeliveryError: Called outside a handler.
    """
    found = active.get()
    if isinstance(found, tuple):  # a turn, which knows its delivery without its unit
        turn, index = cast("tuple[Turn, int]", found)
        return turn.delivery(index)
    unit: Surrounding | None = found
    if unit is None or unit.delivery is None:
        raise NoDeliveryError(
            "current_delivery() is for handlers and what they call; nothing here belongs to one. "
            "Where the delivery's id is needed elsewhere, have the handler pass it on"
        )
    return unit.delivery


def way_in() -> Callable[[tuple[Turn, int]], object]:
    """What enters a delivery: called in the delivery's context variables, before the handler."""
    return _enter_for_logs if binds() else active.set


def _enter_for_logs(delivered: tuple[Turn, int]) -> None:
    """As `active.set`, and what the handler logs with structlog says whose it is."""
    active.set(delivered)
    turn, index = delivered
    event_type = type_name(type(turn.event))
    delivery = turn.delivery(index)
    bind(event_type=event_type, handler=delivery.handler, delivery_id=str(delivery.id))


def on_this_loop(captured: Context) -> Context:
    """The captured context variables, as they are to be on the event loop that calls.

    They may be of a publisher that was in a thread, or on another kind of event loop.
    """
    captured = captured.copy()
    captured.run(thread_level.set, thread_level.get())
    captured.run(library.set, library.get(None))
    return captured


@contextmanager
def outside(
    state: BusState, reason: str, where: object, *, waits: bool | None = None
) -> Generator[None]:
    """No unit of work is active in the block; an attempt to publish is told the reason.

    Units that are opened in it, or in tasks that are started in it, are of the origin `where`.
    `waits` says whether those of this bus deliver their events themselves; None leaves that as it
    was.
    """
    was, told, came = active.set(None), _outside.set(reason), origin.set(where)
    states = waiting.get()
    if waits is not None:
        states = states | {state} if waits else states - {state}
    waited = waiting.set(states)
    try:
        yield
    finally:
        waiting.reset(waited)
        origin.reset(came)
        _outside.reset(told)
        active.reset(was)


def why_none() -> str:
    """Why no unit of work of a bus surrounds the caller, and what to do."""
    enclosing: Surrounding | None = current()
    reason = _outside.get()
    if enclosing is not None:
        return (
            f"this is a unit of work of another bus, {enclosing.state.name!r}, and it is not "
            "inside one of this bus. Publish to that one, or open a unit of work of this bus: "
            "`async with bus.context():`; two buses in one application need the middleware each, "
            "and names: EventBus(name=...)"
        )
    if reason is not None:
        return reason
    if on_event_loop() or in_worker_thread():
        return (
            "no request or job surrounds the caller. In a web application install the middleware: "
            "app.add_middleware(EventContextMiddleware, bus=bus). If it is installed, this code "
            "runs outside of it: add it last, because the last one added is the outermost. "
            "Elsewhere, and in an exception_handler(Exception), which is outside of all "
            "middlewares, open a unit of work: `async with bus.context():`, in a thread "
            "`with bus.context():`"
        )
    thread = threading.current_thread()
    if thread is not threading.main_thread():
        return (
            f"the thread {thread.name!r} was started without its creator's context variables. "
            "Use anyio.to_thread.run_sync() or asyncio.to_thread(), which pass them on, or open "
            "a unit of work of its own: `with bus.context():`"
        )
    return (
        "this is start-up code, a script or a synchronous test. Open a unit of work: "
        "`with bus.context():`"
    )


def why_not_open(unit: Any) -> str:  # Any: as above
    """Why a unit of work takes no events, and what to do."""
    bus = unit.state.name
    if unit.queue.state is State.NEW:
        return f"this event context of bus {bus!r} is not open yet: use `async with`"
    if unit.is_delivery:
        return (
            f"the handler that this event context of bus {bus!r} belongs to has ended "
            f"({unit.delivery}). A task that outlives its handler needs a unit that is "
            "independent of it: `async with bus.context(independent=True):`, in a thread `with`"
        )
    return (
        f"this event context of bus {bus!r} has ended: the request or job it belongs to is "
        "over, and its events were delivered or discarded. A task or thread that outlives it "
        "needs a unit that is independent of it: `async with bus.context(independent=True):`, "
        "in a thread `with`"
    )
