"""Owns streams: the events of one type as an async iterator, for server-sent events or websockets.

Built on subscriptions alone. A stream shows what is dispatched in this process, and nothing else.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any, Generic, Literal, Self, TypeVar

from anyio import Event
from anyio.lowlevel import checkpoint, current_token

from eventkit._core.bus import EventBus
from eventkit._core.events import type_name
from eventkit._core.locks import new_lock
from eventkit._core.log import log
from eventkit.exceptions import StreamOverflowError

__all__ = ["EventStream", "Overflow", "end_at_shutdown", "stream"]

E = TypeVar("E")

Overflow = Literal["drop_oldest", "raise"]
"""What a full buffer does: drop its oldest event, or end the stream with an error."""

# Changed by `stream` and `end_at_shutdown` alone, in single steps, and read by a signal handler.
_open: set[EventStream[Any]] = set()  # Any: streams of all types
_ending: set[EventBus] = set()  # buses whose streams end as soon as they are opened


@asynccontextmanager
async def stream(
    bus: EventBus, event_type: type[E], *, buffer: int = 100, overflow: Overflow = "drop_oldest"
) -> AsyncGenerator[EventStream[E]]:
    """Open a stream of the events of one type, subclasses included, for the block.

        async with stream(bus, OrderPaid) as paid:
            async for event in paid:
                yield {"order_id": event.order_id}

    A websocket has to receive beside it, or it does not hear that the browser has left; the page
    about streams has the whole example.

    It gets what is dispatched from now on in this process, on whichever event loop and in
    whichever thread, in the order in which handlers start. Nobody waits for its reader: what has
    not been read is kept in a buffer. It holds no cancel scope and no task group while it is
    open, so an async generator may open it around a `yield`.

    Args:
        bus: Whose events.
        event_type: A class; `object` for every event.
        buffer: How many events may wait to be read.
        overflow: What happens to an event that finds the buffer full. "drop_oldest" makes room by
            dropping what has waited longest, for a reader who wants to know how things stand.
            "raise" drops the event and ends the stream: the reader gets what had been kept, then
            a `StreamOverflowError`, for one who must not miss any and knows where to start
            afresh. Either is counted in `dropped`, and logged once per stream.

    Raises:
        InvalidEventTypeError: `event_type` is not a class.
        TypeError: `bus` is no bus.
        ValueError: `buffer` is not above 0, or there is no such `overflow`.
    """
    _check("stream(bus, OrderPaid)", bus)
    if buffer < 1:
        raise ValueError(f"buffer is how many events may wait, at least 1, not {buffer!r}")
    if overflow not in ("drop_oldest", "raise"):
        raise ValueError(f'overflow is "drop_oldest" or "raise", not {overflow!r}')
    events = EventStream(bus, event_type, buffer, overflow)
    with bus.subscribe(event_type, events._put, thread=False):  # noqa: SLF001 - its other half
        _open.add(events)
        if bus in _ending:
            events.end()
        try:
            yield events
        finally:
            _open.discard(events)
            events._close()  # noqa: SLF001 - its other half


class EventStream(Generic[E]):
    """An async iterator of events; made by `stream`.

    It ends when its block is left, after `end`, and where its process is told to stop (see
    `end_at_shutdown`). Waiting for the next event can be cancelled, and loses none. Several tasks
    may read it; each event goes to one of them.

    Attributes:
        dropped: How many events were not kept, because the buffer was full.
    """

    __slots__ = (
        "_arrival",
        "_buffer",
        "_bus",
        "_call_soon",
        "_event_type",
        "_lock",
        "_overflow",
        "_size",
        "_state",
        "_token",
        "dropped",
    )

    def __init__(self, bus: EventBus, event_type: type[E], size: int, overflow: Overflow) -> None:
        self.dropped: int = 0
        self._bus = bus
        self._event_type = event_type
        self._buffer: deque[E] = deque()
        self._size = size
        self._overflow = overflow
        self._state: Literal["open", "ended", "overflown"] = "open"
        self._lock = new_lock()
        self._arrival = Event()  # set, and never cleared: each wait has a new one
        self._token = current_token()
        self._call_soon = threadsafe_call_of(self._token)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E:
        await checkpoint()
        while True:
            with self._lock:
                if self._buffer:
                    return self._buffer.popleft()
                if self._state == "overflown":
                    raise StreamOverflowError(type_name(self._event_type), self._size)
                if self._state == "ended":
                    raise StopAsyncIteration
                if self._arrival.is_set():
                    self._arrival = Event()
                arrival = self._arrival
            await arrival.wait()

    def end(self) -> None:
        """Take no more events; the reader gets what has been kept, then the end.

        From any thread, and also from a signal handler.
        """
        with self._lock:
            if self._state == "open":
                self._state = "ended"
        self._wake_from_anywhere()

    def __repr__(self) -> str:
        kind = type_name(self._event_type)
        return (
            f"<EventStream of {kind}, {self._state}, {len(self._buffer)} of {self._size} waiting, "
            f"{self.dropped} dropped>"
        )

    def _put(self, event: E) -> None:
        """Keep an event for the reader. The handler that is subscribed: called on any loop."""
        with self._lock:
            if self._state != "open":
                return
            full = len(self._buffer) == self._size
            if full:
                self.dropped += 1
                if self._overflow == "raise":
                    self._state = "overflown"
                else:
                    self._buffer.popleft()
            if self._state == "open":
                self._buffer.append(event)
        if current_token() == self._token:
            self._wake()
        else:
            self._wake_from_anywhere()
        if full and self.dropped == 1:
            log(
                logging.WARNING,
                "a stream is read too slowly",
                bus=self._bus.name,
                event_type=type_name(self._event_type),
                buffer=self._size,
                overflow=self._overflow,
            )

    def _close(self) -> None:
        """End it, and forget what has not been read."""
        self._buffer.clear()
        self.end()

    def _wake(self) -> None:
        with self._lock:
            self._arrival.set()

    def _wake_from_anywhere(self) -> None:
        try:
            self._call_soon(self._wake)
        except RuntimeError:  # its event loop has ended, and its reader with it
            self._state = "ended"
            self._buffer.clear()


@contextmanager
def end_at_shutdown(
    bus: EventBus, *, signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
) -> Generator[None]:
    """End the streams of a bus as soon as the process is told to stop; for the app's lifespan.

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
            with end_at_shutdown(bus):
                yield

    A server that is told to stop first waits for its responses, and only then ends the lifespan;
    a response that reads a stream has no end. So this listens to the signals itself, and hands
    them on to whoever listened before. Then, and at the end of the block, all streams of the bus
    end, and so do those that are opened later, until the block has been left.

    Python hears of signals in its main thread only: in another one (`TestClient` runs the app in
    one) only the end of the block counts.

    Raises:
        TypeError: `bus` is no bus.
    """
    _check("end_at_shutdown(bus)", bus)
    before: dict[signal.Signals, Any] = {}  # Any: a function, or one of two constants
    left = False

    def end(number: int, frame: FrameType | None) -> None:
        if not left:
            _end_all(bus)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in signals:
            before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        left = True
        _end_all(bus)
        _ending.discard(bus)
        for number, handler in before.items():
            if signal.getsignal(number) is end:  # or somebody hands on to us
                signal.signal(number, handler)


def _check(call: str, bus: object) -> None:
    if not isinstance(bus, EventBus):
        name, _, _ = call.partition("(")
        raise TypeError(f"{name}() takes an EventBus first, not {bus!r}: {call}")


def _end_all(bus: EventBus) -> None:
    _ending.add(bus)
    for events in [*_open]:
        if events._bus is bus:  # noqa: SLF001 - both are about the streams of a bus
            events.end()


def threadsafe_call_of(token: object) -> Callable[[Callable[[], object]], object]:
    """How to have a function called on an event loop from anywhere, without waiting for it.

    AnyIO's own way into a loop waits until the call has been made: two loops that tell each other
    of events would wait for each other. What the loops have themselves is the same by two names.
    """
    loop: Any = getattr(token, "native_token", token)  # Any: as each event loop has it
    call: Callable[[Callable[[], object]], object] | None
    call = getattr(loop, "call_soon_threadsafe", None)
    return call or loop.run_sync_soon  # type: ignore[no-any-return]
