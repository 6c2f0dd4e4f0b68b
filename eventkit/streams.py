"""Streams: the events of one type as an async iterator, for server-sent events or websockets.

A stream shows only the events that are dispatched in this process. It uses a subscription.
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

# Only `stream` and `end_at_shutdown` change these sets, in single steps. Signal handlers read them.
_open: set[EventStream[Any]] = set()  # Any: streams of all types
_ending: set[EventBus] = set()  # buses in shutdown: a new stream of them ends at once


@asynccontextmanager
async def stream(
    bus: EventBus, event_type: type[E], *, buffer: int = 100, overflow: Overflow = "drop_oldest"
) -> AsyncGenerator[EventStream[E]]:
    """Open a stream of the events of one type, including subclasses, for the block.

        async with stream(bus, OrderPaid) as paid:
            async for event in paid:
                yield {"order_id": event.order_id}

    The stream gets the events that are dispatched from now on in this process, on every event loop
    and in every thread, in the order in which handlers start. Publishers and handlers never wait
    for the reader: a buffer keeps the events that have not been read. An open stream holds no
    cancel scope and no task group, so an async generator may open it around a `yield`.

    A websocket has to receive messages at the same time, because otherwise it does not notice that
    the browser has disconnected. The page "Streams" has the whole example:
    https://fastapi-eventkit.readthedocs.io/streams/.

    Args:
        bus: The bus.
        event_type: A class; `object` for every event.
        buffer: How many events may wait to be read.
        overflow: What happens if an event arrives and the buffer is full. "drop_oldest" drops the
            event that has waited longest. It is for readers that need only the current state.
            "raise" drops the new event and ends the stream: the reader gets the events in the
            buffer, then a `StreamOverflowError`. It is for readers that must not miss an event, and
            that can load the current state again. Dropped events are counted in `dropped`. Each
            stream logs this once.

    Raises:
        InvalidEventTypeError: `event_type` is not a class.
        TypeError: `bus` is not an `EventBus`.
        ValueError: `buffer` is below 1, or `overflow` is another text.
    """
    _check("stream(bus, OrderPaid)", bus)
    if buffer < 1:
        raise ValueError(f"buffer is how many events may wait, at least 1, not {buffer!r}")
    if overflow not in ("drop_oldest", "raise"):
        raise ValueError(f'overflow is "drop_oldest" or "raise", not {overflow!r}')
    events = EventStream(bus, event_type, buffer, overflow)
    with bus.subscribe(event_type, events._put, thread=False):  # noqa: SLF001 - same module
        _open.add(events)
        if bus in _ending:
            events.end()
        try:
            yield events
        finally:
            _open.discard(events)
            events._close()  # noqa: SLF001 - same module


class EventStream(Generic[E]):
    """An async iterator of events, opened by `stream`.

        async for event in events:
            print(event)

    The stream ends when its block is left, after `end()`, and at the shutdown of the process (see
    `end_at_shutdown`). A cancellation while waiting for the next event loses no event. Several
    tasks may read one stream. Then each event goes to one of them.

    Attributes:
        dropped: How many events were dropped because the buffer was full.
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
        self._arrival = Event()  # an AnyIO event cannot be cleared, so each wait gets a new one
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
        """End the stream: it takes no more events, and the reader gets those in the buffer.

        It may be called from any thread, and from a signal handler.
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
        """Add an event to the buffer. This is the subscribed handler; any loop may call it."""
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
        """End the stream, and drop the events that have not been read."""
        self._buffer.clear()
        self.end()

    def _wake(self) -> None:
        with self._lock:
            self._arrival.set()

    def _wake_from_anywhere(self) -> None:
        try:
            self._call_soon(self._wake)
        except RuntimeError:  # the event loop of the reader has ended
            self._state = "ended"
            self._buffer.clear()


@contextmanager
def end_at_shutdown(
    bus: EventBus, *, signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
) -> Generator[None]:
    """End the streams of a bus when the process gets a signal to stop; use it in the lifespan.

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
            with end_at_shutdown(bus):
                yield

    A server that gets a signal to stop waits for its responses first, and ends the lifespan then.
    A response that reads a stream never ends. So this function handles the signals itself, and
    then calls the signal handlers that were there before. At a signal, and at the end of the block,
    all streams of the bus end. A stream that is opened between the signal and the end of the block
    ends at once.

    Python handles signals only in the main thread. In other threads the streams end at the end of
    the block. `TestClient` runs the application in another thread.

    Args:
        bus: The bus.
        signals: The signals to handle.

    Raises:
        TypeError: `bus` is not an `EventBus`.
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
            if signal.getsignal(number) is end:  # else a later signal handler calls `end`
                signal.signal(number, handler)


def _check(call: str, bus: object) -> None:
    if not isinstance(bus, EventBus):
        name, _, _ = call.partition("(")
        raise TypeError(f"{name}() takes an EventBus first, not {bus!r}: {call}")


def _end_all(bus: EventBus) -> None:
    _ending.add(bus)
    for events in [*_open]:
        if events._bus is bus:  # noqa: SLF001 - same module
            events.end()


def threadsafe_call_of(token: object) -> Callable[[Callable[[], object]], object]:
    """Return a function that schedules a call on an event loop from any thread, without waiting.

    AnyIO's function for this waits until the call was made. Two loops that use it for each other
    would deadlock. asyncio and trio have the same function under different names.
    """
    loop: Any = getattr(token, "native_token", token)  # Any: as each event loop has it
    call: Callable[[Callable[[], object]], object] | None
    call = getattr(loop, "call_soon_threadsafe", None)
    return call or loop.run_sync_soon  # type: ignore[no-any-return]
