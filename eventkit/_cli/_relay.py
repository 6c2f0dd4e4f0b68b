"""Owns a relay as a process of its own: its event loop, its signals, the lifespan of its app.

| moment | what a SIGTERM or Ctrl-C does |
|---|---|
| before the event loop runs | the system ends the process; nothing has begun |
| the relay runs | the relay stops: running handlers may finish, the other deliveries go back |
| the relay stops | the system ends the process; its leases expire |
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import anyio
from anyio import CancelScope, Event, create_task_group, move_on_after
from starlette.types import ASGIApp, Message

from eventkit._cli._problems import Failure, Mistake, only
from eventkit._cli._targets import Target
from eventkit._core.bus import state_of
from eventkit._core.log import log
from eventkit._core.loops.changes import GRACE_SECONDS
from eventkit._core.loops.tasks import tasks_here
from eventkit.exceptions import EventKitError, OutboxSchemaError

if TYPE_CHECKING:
    from eventkit.outbox import Outbox

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LINE = "%(asctime)s %(levelname)-8s %(name)s: %(message)s"


def run(
    name: str,
    target: Target,
    *,
    loop: str,
    concurrency: int | None,
    shutdown_timeout: float | None,
) -> None:
    """Be a relay until a signal comes.

    Args:
        name: The argument `module:attr`.
        target: The outboxes behind the name.
        loop: asyncio, trio or uvloop.
        concurrency: How many deliveries run at once. None: the option of the outbox or the app.
        shutdown_timeout: Seconds for running handlers at the end. None: the app's option, or 20.

    Raises:
        Mistake: There is nothing to run.
        Failure: The app fails.
        OutboxSchemaError: The tables are missing, or have another version.
    """
    _check_loop(loop, target)
    _log_to_stderr()
    for outbox in target.outboxes:
        outbox.concurrency = concurrency or outbox.concurrency
        _become_relay(name, outbox, shutdown_timeout)
    backend = "trio" if loop == "trio" else "asyncio"
    options = {"use_uvloop": True} if loop == "uvloop" else {}
    if target.app is None:
        (outbox,) = target.outboxes
        _refuse_idleness(name, target.outboxes)
        anyio.run(_run_outbox, outbox, shutdown_timeout, backend=backend, backend_options=options)
    else:
        args = (name, target.app, target.outboxes)
        anyio.run(_run_app, *args, backend=backend, backend_options=options)
    for outbox in target.outboxes:
        outbox.detach()


def _check_loop(loop: str, target: Target) -> None:
    from eventkit.outbox._outbox import holdings_of

    if loop != "asyncio" and find_spec(loop) is None:
        raise Mistake(f"--loop {loop} needs {loop}, which is not installed: pip install {loop}")
    if loop == "trio" and any(holdings_of(each).database.awaits for each in target.outboxes):
        raise Mistake(
            "an AsyncEngine works on asyncio only: leave out --loop trio, or give the outbox a "
            "blocking engine"
        )


def _log_to_stderr() -> None:
    """Show the log on stderr, unless the application has configured logging."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format=_LINE, stream=sys.stderr)


def _become_relay(name: str, outbox: Outbox, patience: float | None) -> None:
    from eventkit.outbox._outbox import holdings_of

    holdings = holdings_of(outbox)
    if holdings.database.is_in_memory:
        raise Mistake(
            f"{name} has SQLite in memory, which belongs to one process: a relay needs a database "
            "that it shares with the processes that publish"
        )
    holdings.become_relay()
    holdings.patience = patience


def _refuse_idleness(name: str, outboxes: Sequence[Outbox]) -> None:
    if not any(map(_durable_handlers, outboxes)):
        raise Mistake(
            f"{name} has no durable handler, so there is nothing to run: name an outbox or an app "
            "in a module that includes the routers"
        )


def _durable_handlers(outbox: Outbox) -> list[str]:
    durable = (entry["handler"] for entry in outbox.bus.describe() if entry["durable"])
    return [*dict.fromkeys(durable)]


async def _run_outbox(outbox: Outbox, shutdown_timeout: float | None) -> None:
    from eventkit.outbox._outbox import CONCURRENCY, holdings_of
    from eventkit.outbox._relay import run_until_cancelled

    holdings, state = holdings_of(outbox), state_of(outbox.bus)
    timeout = 20.0 if shutdown_timeout is None else shutdown_timeout

    def left(stuck: bool) -> None:
        _say_end([outbox])
        if stuck:
            _leave_behind()

    _say_begin([outbox])
    with CancelScope() as scope, _told_to_stop(scope.cancel):
        concurrency = outbox.concurrency or CONCURRENCY
        await run_until_cancelled(holdings, state, concurrency, timeout, left)


async def _run_app(name: str, app: ASGIApp, outboxes: Sequence[Outbox]) -> None:
    """Run the app's lifespan, and nothing else of it."""
    lifespan = _Lifespan(app, lambda: _check_relays(name, outboxes))
    async with create_task_group() as tasks:
        with _told_to_stop(lifespan.stop.set):
            tasks.start_soon(lifespan.run)
            await lifespan.over.wait()
        with move_on_after(GRACE_SECONDS):  # it has said that it is shut down
            await lifespan.ended.wait()
        _say_end(outboxes)
        if not lifespan.ended.is_set():
            _leave_behind()
    lifespan.raise_problem(name)


def _check_relays(name: str, outboxes: Sequence[Outbox]) -> None:
    """Log the running relays of the started app; refuse an app without one."""
    from eventkit.outbox._outbox import holdings_of

    _refuse_idleness(name, outboxes)
    serving = [each for each in outboxes if holdings_of(each).looking]
    if not serving:
        raise Mistake(
            f"{name} has started, and runs no relay: add the middleware with the bus of the "
            "outbox, app.add_middleware(EventContextMiddleware, bus=bus)"
        )
    _say_begin(serving)


class _Lifespan:
    """The lifespan of an app, without a server.

    Attributes:
        stop: To be set; the app shuts down then.
        over: Set when the app has announced its shutdown, or has ended.
        ended: Set when the app has ended.
    """

    def __init__(self, app: ASGIApp, ready: Callable[[], None]) -> None:
        self.stop = Event()
        self.over = Event()
        self.ended = Event()
        self._app = app
        self._ready = ready
        self._asked = False
        self._started = False
        self._problem: BaseException | None = None

    async def run(self) -> None:
        """Run the lifespan to its end, and keep its failure."""
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": dict[str, object](),
        }
        try:
            await self._app(scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001 - the app raises anything; see `raise_problem`
            self._problem = self._problem or error
        finally:
            self.over.set()
            self.ended.set()

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "lifespan.startup"}
        await self.stop.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            self._started = True
            try:
                self._ready()
            except Mistake as mistake:
                self._problem = mistake
                self.stop.set()
        elif message["type"].startswith("lifespan.shutdown."):
            self.over.set()

    def raise_problem(self, name: str) -> None:
        """Raise the failure, if there is one."""
        problem, self._problem = self._problem, None
        if problem is None and self._started:
            return
        problem = None if problem is None else only(problem)
        if isinstance(problem, Mistake | OutboxSchemaError):
            raise problem
        if isinstance(problem, EventKitError):
            raise Mistake(f"{name} does not start: {problem}")
        if problem is not None:
            log(logging.ERROR, "the app has failed", error=problem, app=name)
        raise Failure(f"{name} {'has failed' if self._started else 'does not start'}")


@contextmanager
def interruptible() -> Generator[None]:
    """Let Ctrl-C end the process while modules are imported.

    Python raises an exception instead. That exception is lost in a callback of the collector.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _told_to_stop(stop: Callable[[], object]) -> Generator[None]:
    """Call `stop` on the event loop at the first signal; end the process at the next one.

    The signal handlers are those of Python, not of the event loop: a user's handler may block the
    event loop, and the second signal has to work then, too.
    """
    call_soon = tasks_here("eventkit relay").call_soon
    heard: list[str] = []

    def hear(number: int, frame: object) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        heard.append(signal.Signals(number).name)
        call_soon(obey)

    def obey() -> None:
        log(
            logging.INFO,
            "the relay stops: running handlers may finish, the other deliveries go back to the "
            "table. Another signal ends the process at once",
            signal=heard[0],
        )
        stop()

    before = {each: signal.signal(each, hear) for each in _SIGNALS}
    try:
        yield
    finally:
        if not heard:
            for each, handler in before.items():
                signal.signal(each, handler)


def _say_begin(outboxes: Sequence[Outbox]) -> None:
    from eventkit.outbox._outbox import holdings_of

    for outbox in outboxes:
        log(
            logging.INFO,
            "the relay begins",
            bus=outbox.bus.name,
            handlers=", ".join(_durable_handlers(outbox)),
            database=holdings_of(outbox).database.address,
        )


def _say_end(outboxes: Sequence[Outbox]) -> None:
    from eventkit.outbox._outbox import holdings_of

    for outbox in outboxes:
        stats = outbox.bus.stats
        log(
            logging.INFO,
            "the relay has ended",
            bus=outbox.bus.name,
            handled=stats.handled,
            failed=stats.failed,
            given_back=holdings_of(outbox).given_back,
        )


def _leave_behind() -> None:
    """End the process while handlers still run: a thread cannot be stopped from outside."""
    log(logging.ERROR, "the process ends while handlers still run: their deliveries run again")
    logging.shutdown()
    os._exit(1)
