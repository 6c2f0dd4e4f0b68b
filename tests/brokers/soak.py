"""Two services and a broker, killed at random, and what their databases say afterwards."""

import random
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sqlalchemy import create_engine

from tests.brokers.places import Place
from tests.crash.nursery import PATIENCE
from tests.crash.processes import Process
from tests.crash.tables import prepare

ROLES = ("orders", "billing")


@dataclass(slots=True)
class Report:
    """What was done to the processes, and what the databases say.

    Attributes:
        kills: Of services.
        stops: By SIGTERM.
        restarts: Of the broker.
        cuts: When the broker closed all connections.
        orders: How many were committed.
        missing: Orders without an effect.
        phantom: Effects without an order.
        twice: Effects that are there more than once.
        left: Rows of outboxes.
        ended: Services that ended by themselves.
    """

    seconds: float
    seed: int
    kills: int = 0
    stops: int = 0
    restarts: int = 0
    cuts: int = 0
    orders: int = 0
    missing: list[str] = field(default_factory=list[str])
    phantom: list[str] = field(default_factory=list[str])
    twice: list[str] = field(default_factory=list[str])
    left: list[tuple[object, ...]] = field(default_factory=list[tuple[object, ...]])
    ended: list[str] = field(default_factory=list[str])

    def problems(self) -> list[str]:
        """What must not be."""
        found = {
            name: getattr(self, name) for name in ("missing", "phantom", "twice", "left", "ended")
        }
        return [f"{name}: {each[:10]}" for name, each in found.items() if each]

    def __str__(self) -> str:
        return (
            f"{self.seconds:g} s, seed {self.seed}: {self.kills} kills, {self.stops} stops, "
            f"{self.restarts} restarts of the broker, {self.cuts} times cut off; "
            f"{self.orders} orders: "
            f"{len(self.missing)} without an effect, {len(self.phantom)} effects without an order, "
            f"{len(self.twice)} twice, {len(self.left)} rows left, {len(self.ended)} services "
            "ended by themselves"
        )


class Soak:
    """One run."""

    def __init__(self, place: Place, folder: Path, seconds: float, seed: int | None = None) -> None:
        seed = random.randrange(1 << 32) if seed is None else seed
        self.place = place
        self.files = {role: folder / f"{role}.db" for role in ROLES}
        self.report = Report(seconds, seed)
        self.chance = random.Random(seed)
        self.running: dict[str, Process] = {}
        for file in self.files.values():
            engine = create_engine(f"sqlite:///{file}")
            prepare(engine)
            engine.dispose()

    def begin(self, role: str) -> None:
        database, seed = str(self.files[role]), str(self.chance.getrandbits(32))
        process = self.place.start("--role", role, "--database", database, "--seed", seed)
        process.hear("ready")
        self.running[role] = process

    def run(self) -> Report:
        """Kill and stop them until the time is over, have all handled, and count."""
        for role in ROLES:
            self.begin(role)
        until = time.monotonic() + self.report.seconds
        # The one place that goes by the clock: blows come at random times.
        for blow in self.blows():
            if (left := until - time.monotonic()) <= 0:
                break
            time.sleep(min(left, self.chance.uniform(0.2, 2.0)))
            blow()
        for role in ROLES:
            self.look_at(role)
        if not self.report.ended:
            self.finish()
        self.count()
        return self.report

    def blows(self) -> Iterator[Callable[[], None]]:
        """What happens: all of it in some order, and again in another one."""
        all_of_them: list[Callable[[], None]] = [
            partial(blow, role) for blow in (self.kill, self.stop) for role in ROLES
        ]
        server = self.place.server
        if server.keeps:
            all_of_them.append(self.restart)
        if server.closes_connections:
            all_of_them.append(self.cut)
        while True:
            yield from self.chance.sample(all_of_them, len(all_of_them))

    def kill(self, role: str) -> None:
        self.look_at(role)
        self.running[role].kill()
        self.report.kills += 1
        self.begin(role)

    def stop(self, role: str) -> None:
        self.look_at(role)
        self.running[role].signal(signal.SIGTERM)
        self.running[role].wait()
        self.report.stops += 1
        self.begin(role)

    def restart(self) -> None:
        self.place.server.kill()
        time.sleep(self.chance.uniform(0.0, 2.0))
        self.place.server.start()
        self.report.restarts += 1

    def cut(self) -> None:
        self.place.server.close_connections()
        self.report.cuts += 1

    def look_at(self, role: str) -> None:
        """Note that a service has ended by itself."""
        if not self.running[role].is_running:
            self.report.ended.append(f"{role}: {self.running[role].story()}")

    def finish(self) -> None:
        """Have nobody commit any more, and wait as long as less and less is to be done."""
        self.running["orders"].tell("rest")
        self.running["orders"].hear("rests")
        least, deadline = sys.maxsize, time.monotonic() + PATIENCE
        while least and time.monotonic() < deadline:
            left = len(self.rows("orders")) + len(self.rows("billing"))
            left += len({*self.ids("orders", "business")} - {*self.ids("billing", "effects")})
            if left < least:
                least, deadline = left, time.monotonic() + PATIENCE
            time.sleep(0.2)  # other processes write it, and tell nobody
        for process in self.running.values():
            process.signal(signal.SIGTERM)
            process.wait()

    def count(self) -> None:
        orders, effects = self.ids("orders", "business"), self.ids("billing", "effects")
        self.report.orders = len(orders)
        self.report.missing = sorted({*orders} - {*effects})
        self.report.phantom = sorted({*effects} - {*orders})
        self.report.twice = sorted(each for each, times in effects.items() if times > 1)
        self.report.left = [row for role in ROLES for row in self.rows(role)]

    def ids(self, role: str, table: str) -> Counter[str]:
        return Counter(str(row[0]) for row in self.query(role, f"select id from {table}"))

    def rows(self, role: str) -> list[tuple[object, ...]]:
        return self.query(role, "select handler, state, attempt from eventkit_outbox")

    def query(self, role: str, statement: str) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(self.files[role], timeout=50)) as connection:
            return list(connection.execute(statement))
