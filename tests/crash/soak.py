"""Three processes that commit and handle, killed and stopped at random, and what is left of it.

`python -m tests.crash.soak --driver asyncpg --seconds 60` runs one on a database of its own.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from tests.crash.cluster import Cluster, cluster
from tests.crash.nursery import PATIENCE, Nursery
from tests.crash.processes import LEASE, Process, Workers, workers
from tests.crash.tables import Count, count, engine_for, prepare

HANDLERS = ["plain", "exact", "keyed"]
PROCESSES = 3
REAPED = "a process has stopped without ending its lease, and others run its deliveries"
LOOPS = {"pysqlite": "trio", "aiosqlite": "asyncio", "psycopg": "trio", "asyncpg": "asyncio"}


@dataclass(slots=True)
class Report:
    """What was done to the processes, and what the database says."""

    seconds: float
    seed: int
    kills: int = 0
    stops: int = 0
    restarts: int = 0
    cuts: int = 0
    lost: int = 0
    refused: int = 0
    reaped: int = 0
    in_flight: int = 0
    raised: dict[str, int] = field(default_factory=dict[str, int])
    count: Count | None = None

    @property
    def may_run_twice(self) -> int:
        """How many effects may have been done and not yet written down, at each of these.

        On a busy machine more processes may be late than were stopped.
        """
        blows = self.kills + self.stops + PROCESSES * (self.restarts + self.cuts)
        return (blows + self.reaped) * self.in_flight

    def problems(self) -> list[str]:
        """What must not be."""
        found = self.count
        assert found is not None
        return [
            *([f"missing: {found.missing[:10]}"] if found.missing else []),
            *([f"phantom: {found.phantom[:10]}"] if found.phantom else []),
            *(
                [f"exactly once is twice: {found.twice}"]
                if found.twice["exact"] or found.twice["keyed"]
                else []
            ),
            *(
                [f"more twice than were in flight: {found.twice}"]
                if found.twice["plain"] > self.may_run_twice
                else []
            ),
            *([f"left: {found.rows}"] if found.rows else []),
            *([f"out of order: {found.disordered}"] if found.disordered else []),
        ]

    def __str__(self) -> str:
        found = self.count
        assert found is not None
        return (
            f"{self.seconds:g} s, seed {self.seed}: {self.kills} kills, {self.stops} stops, "
            f"{self.restarts} restarts, {self.cuts} times cut; "
            f"{found.business} commits x {len(HANDLERS)} handlers: "
            f"{len(found.missing)} missing, {len(found.phantom)} phantom, "
            f"twice {dict(found.twice)} (plain may be {self.may_run_twice}), "
            f"{len(found.disordered)} keys out of order, {found.rows.total()} rows left; "
            f"commits that failed: {self.raised}; processes taken for dead {self.reaped}, "
            f"leases lost {self.lost}, LeaseLostError {self.refused}"
        )


def soak(
    url: str,
    driver: str,
    seconds: float,
    *,
    server: Cluster | None = None,
    seed: int | None = None,
    nursery: Nursery | None = None,
    options: tuple[str, ...] = (),
) -> Report:
    """Let three processes work, kill and stop them at random, and count.

    Args:
        url: An empty database, by a driver that blocks.
        driver: The one that the processes have.
        seconds: For how long.
        server: Restarted now and then, if there is one.
        seed: What decides when it happens to whom.
        options: More of each worker.
    """
    seed = random.randrange(1 << 32) if seed is None else seed
    chance = random.Random(seed)
    report = Report(seconds, seed)
    engine = engine_for(url)
    prepare(engine, keys=4)
    scheme = "sqlite" if "sqlite" in driver else "postgresql"
    with workers(f"{scheme}+{driver}{url[url.index(':') :]}", LOOPS[driver], nursery) as group:

        def begin() -> Process:
            process = group.start(
                *("--handlers", ",".join(HANDLERS), "--seed", str(chance.getrandbits(32)), *options)
            )
            process.tell("soak")
            return process

        running = [begin() for _ in range(PROCESSES)]
        for process in running:
            process.hear("ready")
        until = time.monotonic() + seconds
        # The one place that goes by the clock: blows come at random times.
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, chance.uniform(0.5, 5.0)))
            which = chance.randrange(PROCESSES)
            victim = running[which]
            blow = chance.random() if report.kills else 0.0  # also a short soak has a kill
            if blow < 0.65:
                victim.kill()
                report.kills += 1
                running[which] = begin()
                running[which].hear("ready")
            elif blow < 0.85 or server is None:
                victim.signal(signal.SIGSTOP)
                time.sleep(chance.uniform(0.1, 2 * LEASE))
                victim.signal(signal.SIGCONT)
                report.stops += 1
            elif blow < 0.95:
                cut_connections(server, engine.url.database or "")
                report.cuts += 1
            else:
                server.restart_at_once()
                report.restarts += 1
        finish(group, running, report, engine.url.render_as_string(False))
        raised: dict[str, int] = {}
        for process in group.all:
            for line in process.said("commit failed"):
                kind = str(line["text"]).partition("\n")[0][:60]
                raised[kind] = raised.get(kind, 0) + 1
            report.reaped += sum(
                len(str(line["facts"]["processes"]).split(", "))
                for line in process.said("log", text=REAPED)
            )
            report.refused += len(process.said("raises", error="LeaseLostError"))
            report.in_flight = max(report.in_flight, process.in_flight("plain")[1])
        report.raised = raised
    report.count = count(engine, HANDLERS)
    return report


def finish(group: Workers, running: list[Process], report: Report, url: str) -> None:
    """Have nobody commit any more, and wait until all is handled."""
    for process in running:
        process.tell("rest")
    for process in running:
        report.lost += process.hear("rests")["lost"]
    engine = engine_for(url)
    least, deadline = sys.maxsize, time.monotonic() + PATIENCE
    while least and time.monotonic() < deadline:  # as long as it becomes less
        try:
            with engine.connect() as connection:
                left = connection.execute(text("select count(*) from eventkit_outbox")).scalar_one()
            if left < least:
                least, deadline = left, time.monotonic() + PATIENCE
        except OperationalError:
            pass
        time.sleep(0.2)  # other processes write it, and tell nobody
    for process in running:
        process.stop()


def cut_connections(server: Cluster, name: str) -> None:
    """End all connections of a database, as a proxy or an administrator does."""
    engine = create_engine(server.url("postgres"), poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(
            text("select pg_terminate_backend(pid) from pg_stat_activity where datname = :name"),
            {"name": name},
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--driver", choices=[*LOOPS], required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--keep", help="the SQLite file")
    options = parser.parse_args()
    with ExitStack() as stack:
        if "sqlite" in options.driver:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            server, url = None, f"sqlite:///{options.keep or Path(folder) / 'soak.db'}"
        else:
            server = stack.enter_context(cluster())
            url = server.url(server.new_database())
        nursery = Nursery()
        stack.callback(nursery.close)
        report = soak(
            url,
            options.driver,
            options.seconds,
            server=server,
            seed=options.seed,
            nursery=nursery,
        )
    print(report)
    sys.exit("\n".join(report.problems()) or None)


if __name__ == "__main__":
    main()
