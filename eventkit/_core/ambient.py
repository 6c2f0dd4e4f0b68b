"""Owns the context variables: the unit of work and the delivery that the calling code is in.

Knows only a few attributes of units of work, and makes none.
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
    """The part of a unit of work that this module uses.

    Attributes:
        state: The state that all units of its bus share.
        delivery: The delivery that the unit belongs to, or is inside of.
        is_delivery: Whether the unit is that of a delivery.
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
        """The unit around it, of any bus; None for the unit of a delivery."""
        ...


# What the caller is in: a unit, or a turn with an index. That stands for a delivery whose unit is
# made when it is needed. Any: callers use more of a unit than `Surrounding` has.
active: ContextVar[Any] = ContextVar("eventkit_active", default=None)
origin: ContextVar[object] = ContextVar("eventkit_origin", default=None)
_outside: ContextVar[str | None] = ContextVar("eventkit_outside", default=None)
# The buses whose units deliver their events themselves here, even with `background=True`.
waiting: ContextVar[frozenset[BusState]] = ContextVar("eventkit_waiting", default=frozenset())

# Headers that travel with every event that is published here, also to other processes, such as a
# trace id. A consumer sets them from its message. Events that its handlers publish inherit them.
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
    """The innermost unit of this bus; None if there is none."""
    return next((unit for unit in outward(innermost) if unit.state is state), None)


def surrounding() -> Any:  # Any: as above
    """The unit of work, of any bus, that surrounds the caller; None if it is not open."""
    unit = current()
    return None if unit is None or unit.closed else unit


def running() -> Delivery | None:
    """The delivery that the caller runs in, independent of the unit that it publishes to."""
    unit: Surrounding | None = surrounding()
    return None if unit is None else unit.delivery


def delivering() -> dict[object, Any]:  # Any: as above
    """The bus of the handler that the caller runs in, with the unit of work of the delivery."""
    unit = current()
    return {} if unit is None or not unit.is_delivery else {unit.state.bus: unit}


def current_delivery() -> Delivery:
    """Return the delivery that the caller runs in.

        @bus.on(OrderPaid)
        async def charge(event: OrderPaid) -> None:
            await payments.charge(event.order_id, idempotency_key=str(current_delivery().id))

    It works in the handler, and in all code that has the handler's context variables: functions
    that the handler calls, and tasks and threads that it starts.

    Raises:
        NoDeliveryError: The caller is not in a handler.
    """
    found = active.get()
    if isinstance(found, tuple):  # a turn has the delivery, so no unit is made
        turn, index = cast("tuple[Turn, int]", found)
        return turn.delivery(index)
    unit: Surrounding | None = found
    if unit is None or unit.delivery is None:
        raise NoDeliveryError(
            "current_delivery() was called outside of a handler, and of the code that a handler "
            "calls. If other code needs the delivery's id, pass the id to that code"
        )
    return unit.delivery


def way_in() -> Callable[[tuple[Turn, int]], object]:
    """The function that enters a delivery, in the delivery's context variables."""
    return _enter_for_logs if binds() else active.set


def _enter_for_logs(delivered: tuple[Turn, int]) -> None:
    """As `active.set`; it also adds the delivery to log lines that structlog writes."""
    active.set(delivered)
    turn, index = delivered
    event_type = type_name(type(turn.event))
    delivery = turn.delivery(index)
    bind(event_type=event_type, handler=delivery.handler, delivery_id=str(delivery.id))


def on_this_loop(captured: Context) -> Context:
    """The captured context variables, adapted to the calling event loop.

    The publisher may have been in a thread, or on another kind of event loop.
    """
    captured = captured.copy()
    captured.run(thread_level.set, thread_level.get())
    captured.run(library.set, library.get(None))
    return captured


@contextmanager
def outside(
    state: BusState, reason: str, where: object, *, waits: bool | None = None
) -> Generator[None]:
    """In the block no unit of work is active; the error of a publish has this reason.

    Units that are opened in the block, or in its tasks, have the origin `where`. `waits` says
    whether units of this bus deliver their events themselves; None changes nothing.
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
    """The reason why no unit of work of a bus surrounds the caller, and the remedy."""
    enclosing: Surrounding | None = current()
    reason = _outside.get()
    if enclosing is not None:
        return (
            f"this is a unit of work of another bus, {enclosing.state.name!r}, and none of this "
            "bus is around it. Publish to that bus, or open a unit of work of this bus: "
            "`async with bus.context():`. If an application has two buses, add the middleware for "
            "each bus, and give each bus a name: EventBus(name=...)"
        )
    if reason is not None:
        return reason
    if on_event_loop() or in_worker_thread():
        return (
            "no request or job surrounds the caller. In a web application add the middleware: "
            "app.add_middleware(EventContextMiddleware, bus=bus). If it is there, this code runs "
            "outside of it: add it after the middleware that publishes, because a later one is "
            "further outside. In other code, and in an exception_handler(Exception), which runs "
            "outside of all middlewares, open a unit of work: `async with bus.context():`, or in "
            "a thread `with bus.context():`"
        )
    thread = threading.current_thread()
    if thread is not threading.main_thread():
        return (
            f"the thread {thread.name!r} was started without its creator's context variables. Use "
            "anyio.to_thread.run_sync() or asyncio.to_thread(), which pass them on, or open a "
            "unit of work in the thread: `with bus.context():`"
        )
    return (
        "this is start-up code, a script or a synchronous test. Open a unit of work: "
        "`with bus.context():`"
    )


def why_not_open(unit: Any) -> str:  # Any: as above
    """The reason why a unit of work takes no events, and the remedy."""
    bus = unit.state.name
    if unit.queue.state is State.NEW:
        return f"this event context of bus {bus!r} is not open yet: use `async with`"
    if unit.is_delivery:
        return (
            f"the handler that this event context of bus {bus!r} belongs to has ended "
            f"({unit.delivery}). A task that outlives its handler needs its own unit of work: "
            "`async with bus.context(independent=True):`, or in a thread `with`"
        )
    return (
        f"this event context of bus {bus!r} has ended: its request or job is over, and its events "
        "were delivered or discarded. A task or thread that outlives the request or job needs its "
        "own unit of work: `async with bus.context(independent=True):`, or in a thread `with`"
    )
