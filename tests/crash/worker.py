"""A process that commits, handles and relays, and that may kill itself at a named point.

`python -m tests.crash.worker --url URL --loop trio` reads commands as lines of JSON, and says what
it does as lines of JSON. It is killed by patches that are made here: the package knows nothing of
them.
"""

import argparse
import functools
import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import anyio
from anyio import CancelScope, Event, create_task_group, to_thread
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from eventkit import Durable, EventBus, current_delivery, named
from eventkit._core.bus import state_of
from eventkit.outbox import Outbox, complete_with
from eventkit.outbox import _database as database
from eventkit.outbox import _holdings as holdings
from eventkit.outbox import _keeper as keeper
from eventkit.outbox import _source as source
from eventkit.outbox import _store as store
from eventkit.outbox._rows import Outcome
from tests.crash.tables import Business, Effect

# A unit of work in the background, and as many rows that are fed.
CONCURRENCY = 4
SAYING = threading.Lock()


def say(what: str, /, **facts: object) -> None:
    """Write one line at once: the process may be killed at the next moment."""
    line = json.dumps({"say": what, **facts}) + "\n"
    with SAYING:
        os.write(1, line.encode())


class Lines(logging.Handler):
    """Says what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        facts = {name: str(value) for name, value in getattr(record, "eventkit", {}).items()}
        text = record.getMessage().partition(":")[0]
        error = record.exc_info[1] if record.exc_info else None
        kind = None if error is None else type(error).__name__
        say("log", level=record.levelname, text=text, error=kind, facts=facts)


@named("crash.happened")
@dataclass(frozen=True, slots=True)
class Happened:
    id: str
    key: str | None = None
    how: str = ""


# Points at which the process kills itself


def die(point: str) -> None:
    say("dies", point=point)
    os.kill(os.getpid(), signal.SIGKILL)


Patched = tuple[object, str]


def always(*_: object, **__: object) -> bool:
    return True


def patch(
    where: Patched,
    act: Callable[[], object],
    *,
    before: bool,
    if_: Callable[..., bool] = always,
) -> None:
    """Have something happen before a function does its work, or after it has done so."""
    owner, name = where
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        chosen = if_(*args, **kwargs)
        if before and chosen:
            act()
        result = original(*args, **kwargs)
        if chosen and not before:
            act()
        return result

    setattr(owner, name, patched)


class Gate:
    """Knows when the outbox has no transaction open, in which a process may stand still.

    In the midst of one it would keep what that has locked: SQLite's one lock, or its own row, which
    others cannot take for dead then.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = 0
        transact = database.Database._transact

        @functools.wraps(transact)
        def counted(*args: Any) -> Any:
            self._count(1)
            try:
                return transact(*args)
            finally:
                self._count(-1)

        database.Database._transact = counted  # type: ignore[assignment]

    def _count(self, change: int) -> None:
        with self._changed:
            self._open += change
            self._changed.notify_all()

    def stand_still(self) -> None:
        """Stop this process until it is told to go on, from outside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open)
            say("stands still")
            os.kill(os.getpid(), signal.SIGSTOP)


def tell_what_is_written() -> None:
    """Say which deliveries the table knows to have ended; they are not in flight any more."""
    flush = holdings.Holdings._flush

    async def flush_and_tell(self: holdings.Holdings, outcomes: Sequence[Outcome]) -> bool:
        is_written = await flush(self, outcomes)
        if is_written:
            say("written", deliveries=[str(each.row.id) for each in outcomes])
        return is_written

    holdings.Holdings._flush = flush_and_tell  # type: ignore[method-assign]


def something_is_done(_: object, connection: object, owner: str, done: list[object]) -> bool:
    return bool(done)


# Where the process dies. Those of the worker's own code are named there.
POINTS: dict[str, tuple[Patched, bool, Callable[..., bool]] | None] = {
    "before the commit": None,
    "before the insert": ((store.Store, "insert"), True, always),
    "after the insert": ((keeper.Keeper, "_before_commit"), False, always),
    "after the note": ((store.Store, "note_message"), False, always),
    "after the message's commit": ((keeper.Keeper, "_committed"), True, always),
    "after the commit": ((keeper.Keeper, "_ended"), True, always),
    "after the release": None,
    "before the handler": ((holdings.Holdings, "begin"), True, always),
    "in the handler": None,
    "before the handler's commit": None,
    "after the effect": None,
    "before the deletion": ((store.Store, "complete"), True, something_is_done),
    "after the deletion": ((store.Store, "complete"), False, something_is_done),
    "after the writing": ((holdings.Holdings, "tell_lost"), True, always),
    "before the claim": ((store.Store, "claim"), True, always),
    "after the claim": ((store.Store, "claim"), False, always),
    "after the claim's commit": ((source.RowSource, "_receive"), True, always),
    "before the reaping": ((store.Store, "reap"), True, always),
    "after the reaping": ((store.Store, "reap"), False, always),
    "before the failure": ((store.Store, "fail"), True, always),
    "after the failure": ((store.Store, "fail"), False, always),
    "before the farewell": ((store.Store, "farewell"), True, always),
    "after the farewell": ((store.Store, "farewell"), False, always),
}


class Worker:
    """What the process does, by command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.engine = engine_of(options.url)
        self.bus = EventBus(handler_timeout=None)
        self.go = Event()
        self.released = not options.holds
        self.rests = False
        self.committed = 0
        self.random = random.Random(options.seed)
        if options.slow_insert:
            patch((store.Store, "insert"), lambda: time.sleep(2.5 * options.lease), before=False)
        if options.kill is not None and (point := POINTS[options.kill]) is not None:
            where, before, chosen = point
            patch(where, functools.partial(die, options.kill), before=before, if_=chosen)
        self.gate = Gate()
        tell_what_is_written()
        have_commits_raise(self.engine)
        self.outbox = Outbox(
            self.bus,
            self.engine,
            lease=options.lease,
            relay=not options.no_relay,
            concurrency=CONCURRENCY,
        )
        again = Durable(attempts=options.attempts, backoff=lambda attempt, error: 0.05)
        handlers: dict[str, tuple[Callable[..., Any], Durable]] = {
            "plain": (self.plain, again),
            "exact": (self.exact, again),
            "keyed": (
                self.keyed,
                Durable(
                    attempts=options.attempts,
                    backoff=lambda attempt, error: 0.05,
                    key=lambda event: event.key,
                ),
            ),
        }
        for name in options.handlers.split(","):
            handler, durable = handlers[name]
            self.bus.subscribe(Happened, handler, durable=durable, name=name)

    # Handlers

    async def plain(self, event: Happened) -> None:
        """Write an effect in a transaction of its own."""
        await self.perform("plain", event, completes=False)

    async def exact(self, event: Happened) -> None:
        """Write an effect in the transaction that completes the delivery."""
        await self.perform("exact", event, completes=True)

    async def keyed(self, event: Happened) -> None:
        """As `exact`, in the order of the key."""
        await self.perform("keyed", event, completes=True)

    async def perform(self, name: str, event: Happened, *, completes: bool) -> None:
        delivery = current_delivery()
        facts = {"handler": name, "id": event.id, "delivery": str(delivery.id)}
        say("begins", attempt=delivery.attempt, **facts)
        self.at("in the handler")
        if event.how == "fails" or event.how == "exits":
            if event.how == "exits":
                os._exit(7)
            raise RuntimeError(f"the event quotes itself: {event.id}")
        if (
            event.how in ("random", "raises in handlers")
            and self.random.random() < self.options.failures
        ):
            raise RuntimeError("at random")
        if event.how == "blocks":  # the event loop, too
            time.sleep(2.5 * self.options.lease)  # noqa: ASYNC251 - which is the point
        if event.how == "long":
            await anyio.sleep(3 * self.options.lease)
        if not self.released:
            say("waits", **facts)
            await self.go.wait()
        effect = Effect(handler=name, id=event.id, pid=os.getpid(), attempt=delivery.attempt)

        def write(session: Session) -> None:
            if completes:
                complete_with(session)
            session.add(effect)
            session.flush()
            self.at("before the handler's commit")

        try:
            await self.in_session(write)
        except Exception as error:
            say("raises", error=type(error).__name__, **facts)
            raise
        self.at("after the effect")
        say("ends", **facts)

    # Commands

    async def commit(self, id: str, how: str = "", key: str | None = None) -> None:
        """Commit a business row, and what tells of it."""

        def write(session: Session) -> None:
            number = 0
            if key is not None:  # held until the commit, so keys are in the order of commits
                session.execute(
                    text("update numbers set number = number + 1 where key = :key"), {"key": key}
                )
                number = session.execute(
                    text("select number from numbers where key = :key"), {"key": key}
                ).scalar_one()
            session.add(Business(id=id, key=key, number=number))
            self.bus.publish(Happened(id, key, how))
            session.flush()
            self.at("before the commit")
            if how == "raises":
                raises.set(True)
            if how == "random" and self.random.random() < self.options.failures:
                raise RollBack

        async with self.bus.context(background=True):
            await self.in_session(write)
        self.at("after the release")
        self.committed += 1

    async def in_session(self, write: Callable[[Session], None]) -> None:
        """Do it in a session of the outbox's engine, and commit."""
        if isinstance(self.engine, AsyncEngine):
            async with AsyncSession(self.engine) as session:
                await session.run_sync(write)
                await session.commit()
            return
        engine = self.engine

        def work() -> None:
            with Session(engine) as session:
                write(session)
                session.commit()

        await to_thread.run_sync(work)

    def at(self, point: str) -> None:
        if self.options.kill == point:
            die(point)

    async def publish_on_and_on(self) -> None:
        """Commit, or roll back, until told to rest."""
        async with create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(self.publish_one_by_one)

    async def publish_one_by_one(self) -> None:
        while not self.rests:
            # One in four: what has a key runs one by one, and would be left behind for long.
            number = self.random.randrange(16) if "keyed" in self.options.handlers else 4
            key = str(number) if number < 4 else None
            try:
                await self.commit(f"{self.random.getrandbits(64):016x}", "random", key)
            except RollBack:
                pass
            except (SQLAlchemyError, OSError) as error:
                say("commit failed", error=type(error).__name__, text=str(error)[:300])
                await anyio.sleep(0.1)
            await anyio.sleep(self.random.random() * self.options.pause)

    # The process

    async def run(self) -> None:
        async with create_task_group() as tasks:
            relay = CancelScope()
            if not self.options.script:
                tasks.start_soon(self.relay, relay)
                while not state_of(self.bus).hosts:  # noqa: ASYNC110 - nobody tells when it has begun
                    await anyio.sleep(0.01)
            say("ready", pid=os.getpid(), owner=self.outbox._holdings.lease.owner)
            async for command in commands():
                what = command.pop("do")
                if what == "stop":
                    break
                if what == "rest":
                    self.rests = True
                    say("rests", committed=self.committed, lost=self.outbox._holdings.lost)
                    continue
                if what == "stand still":
                    self.gate.stand_still()
                    continue
                if what == "go":
                    self.released = True
                    self.go.set()
                    continue
                tasks.start_soon(self.obey, what, command)
            relay.cancel()
        say("stopped", committed=self.committed, **conservation(self.bus))

    async def relay(self, scope: CancelScope) -> None:
        with scope:
            await self.outbox.run(shutdown_timeout=self.options.shutdown_timeout)

    async def obey(self, what: str, arguments: dict[str, Any]) -> None:
        try:
            if what == "soak":
                await self.publish_on_and_on()
                return
            if what == "commit":
                await self.commit(**arguments)
            elif what == "receive":
                await self.outbox.receive(
                    Happened(**arguments), consumer="crash", message_id=arguments["id"]
                )
            elif what == "clock":
                say("clock", wall=time.time(), boot=time.clock_gettime(time.CLOCK_BOOTTIME))
        except Exception as error:
            say("refused", what=what, error=type(error).__name__, text=str(error)[:300])
        else:
            say("done", what=what, **arguments)


# Whether the next commit in these context variables happens, and raises all the same.
raises: ContextVar[bool] = ContextVar("raises", default=False)


def have_commits_raise(engine: Engine | AsyncEngine) -> None:
    """As where the answer to a COMMIT is lost on its way."""
    dialect: Any = engine.dialect
    commit = dialect.do_commit

    def commit_and_raise(connection: object) -> None:
        commit(connection)
        if raises.get():
            raises.set(False)
            raise ConnectionResetError("the answer was lost")

    dialect.do_commit = commit_and_raise


class RollBack(Exception):
    """The user thinks better of it."""


def conservation(bus: EventBus) -> dict[str, int]:
    stats = bus.stats
    return {
        name: getattr(stats, name)
        for name in (
            "accepted",
            "handled",
            "failed",
            "discarded",
            "undelivered",
            "requeued",
            "pending",
            "running",
        )
    }


async def commands() -> AsyncIterator[dict[str, Any]]:
    """Lines of JSON from the standard input, without Python's buffers, whose locks outlive us."""
    kept = b""
    while True:
        got = await to_thread.run_sync(os.read, 0, 65536, abandon_on_cancel=True)
        if not got:
            return
        *lines, kept = (kept + got).split(b"\n")
        for line in lines:
            yield json.loads(line)


def engine_of(url: str) -> Engine | AsyncEngine:
    address = make_url(url)
    options: dict[str, Any] = {}
    if address.query.get("bouncer"):  # PgBouncer gives each transaction another connection
        address = address.difference_update_query(["bouncer"])
        options["connect_args"] = (
            {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
            if address.drivername.endswith("asyncpg")
            else {"prepare_threshold": None}
        )
    if address.get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": 50}  # ten times SQLite's own, on a busy machine
    if address.get_dialect().is_async:
        return create_async_engine(address, **options)
    return create_engine(address, **options)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--loop", choices=["asyncio", "trio"], required=True)
    parser.add_argument("--lease", type=float, default=1.5)
    parser.add_argument("--kill", choices=[*POINTS])
    parser.add_argument("--no-relay", action="store_true")
    parser.add_argument("--script", action="store_true", help="run no relay at all")
    parser.add_argument("--slow-insert", action="store_true", help="commits of 2.5 leases")
    parser.add_argument("--holds", action="store_true", help="handlers wait for `go`")
    parser.add_argument("--handlers", default="plain,exact")
    parser.add_argument("--attempts", type=int, default=25)
    parser.add_argument("--failures", type=float, default=0.1)
    parser.add_argument("--pause", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shutdown-timeout", type=float, default=5.0)
    options = parser.parse_args(arguments)
    logger = logging.getLogger("eventkit")
    logger.addHandler(Lines())
    logger.setLevel(logging.INFO)
    anyio.run(run, options, backend=options.loop)


async def run(options: argparse.Namespace) -> None:
    await Worker(options).run()


if __name__ == "__main__":
    main()
