"""Relays whose looks a test decides, rows that other processes have left, and a clock by hand."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import to_thread

from eventkit import EventBus
from eventkit._core.bus import state_of
from eventkit._core.drainer import Drainer
from eventkit._core.loops.threads import Entrance
from eventkit._core.state import Host
from eventkit.outbox import Outbox
from eventkit.outbox._holdings import Holdings
from eventkit.outbox._relay import Relay
from eventkit.outbox._store import NewEvent
from tests.outbox.rows import placed
from tests.outbox.scenes import Scene

DEAD = "host:9:dead"  # the owner's name of a process that has ended


class Clock:
    """What the lease takes for the local clock; it goes on by hand. Its thread does not begin."""

    def __init__(self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.lease = holdings_of(outbox).lease
        monkeypatch.setattr(self.lease, "_clock", lambda: self.now)
        monkeypatch.setattr(self.lease, "start", lambda: None)

    async def go_on(self, seconds: float, *, renewing: bool = True) -> None:
        """Let time pass, with a heartbeat each third of the lease."""
        end = self.now + seconds
        while renewing and self.now < end:
            await to_thread.run_sync(self.lease.beat)
            self.now = min(end, self.now + self.lease.seconds / 3)
        self.now = end


def holdings_of(outbox: Outbox) -> Holdings:
    """What its process holds."""
    return outbox._holdings


@asynccontextmanager
async def relay_of(
    bus: EventBus, outbox: Outbox, *, concurrency: int = 4, starts: bool = False
) -> AsyncGenerator[Relay]:
    """A relay as an application has one. Unless it starts, it looks only by `look`."""
    async with anyio.create_task_group() as tasks:
        state = state_of(bus)
        drainer = Drainer(state, tasks, concurrency=concurrency, max_pending=None)
        host = Host(Entrance(), drainer.submit, None, lambda: False, drainer.begin)
        relay = outbox.serve(host, tasks, concurrency=concurrency)
        if starts:
            await relay.start()
        else:
            holdings_of(outbox).enter(relay)
            relay._entered = True
        try:
            yield relay
        finally:
            relay.stop()
            with anyio.CancelScope(shield=True):
                await drainer.close(5)
                await relay.leave()


async def look(relay: Relay) -> bool:
    """Have it look once."""
    return await relay._look()


def event(*handlers: str, name: str = "ada", **options: Any) -> NewEvent:
    """A `Placed` as it is stored."""
    return placed(*handlers, payload=f'{{"name": "{name}"}}', **options)


def leave_dead(scene: Scene, *handlers: str, owner: str = DEAD, name: str = "ada") -> None:
    """Leave what a process leaves that was killed, long ago."""
    table = scene.table
    table.do(table.store.beat, owner, 15.0)
    if handlers:
        table.insert(event(*handlers, name=name), owner=owner)
    table.lapse(owner)


async def keep(scene: Scene, bus: EventBus, *events: object) -> None:
    """Publish them in a transaction that is committed."""
    async with bus.context() as unit, scene.begun():
        unit.publish(*events)


def warned(caplog: pytest.LogCaptureFixture, text: str) -> int:
    """How many lines of the log say this."""
    return sum(text in record.getMessage() for record in caplog.records)
