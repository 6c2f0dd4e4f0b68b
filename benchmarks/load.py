"""Measures what a server does under load, and at its end, while handlers run after responses.

Each run starts uvicorn anew with one contender and one duration of its handler, sends POST
requests on keep-alive connections for a while, and ends the server with SIGTERM. Contenders are
interleaved, and what is reported are medians with their range. `nox -s load` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from benchmarks.harness import Spread, about
from benchmarks.report import Bar, Panel, drawing, table

ROOT = Path(__file__).parent.parent
CONTENDERS = ("eventkit", "eventkit, concurrency=1000", "BackgroundTasks", "fastapi-events")
PACKAGES = ("fastapi", "starlette", "uvicorn", "anyio", "fastapi-events")
REQUEST = b"POST /orders HTTP/1.1\r\nHost: load\r\nContent-Length: 0\r\n\r\n"
# A server that has not ended by then is killed, and that is its result.
LONGEST_END = 60.0


@dataclass(frozen=True, slots=True)
class Result:
    """One run; times in milliseconds where the name does not say seconds.

    Attributes:
        per_second: Responses of all kinds.
        refused: Responses with 503.
        growth_mb: The most resident memory, less what it had before the load.
        pending: Events whose handler had not ended when the load was over.
        end_seconds: From SIGTERM until the process was gone.
        lost: Events whose handler had not ended then.
        unaccounted: Of these, how many the server's last lines do not own up to.
    """

    contender: str
    delay_ms: int
    requests: int
    per_second: float
    p50: float
    p99: float
    refused: int
    growth_mb: float
    pending: int
    end_seconds: float
    lost: int
    unaccounted: int


class Load:
    """Connections that ask again as soon as they are answered."""

    def __init__(self, port: int, until: float) -> None:
        self.latencies: list[float] = []
        self.refused = 0
        self._port = port
        self._until = until

    async def run(self, connections: int) -> None:
        """Ask until the time is over."""
        await asyncio.gather(*(self._ask() for _ in range(connections)))

    async def _ask(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        while (begun := time.perf_counter()) < self._until:
            writer.write(REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(length_of(head))
            self.latencies.append(time.perf_counter() - begun)
            self.refused += head.startswith(b"HTTP/1.1 503")
        writer.close()


def length_of(head: bytes) -> int:
    """How many bytes the body has, by the head of the response."""
    return int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])


@contextmanager
def server(
    contender: str, delay: float, handlers: int, output: IO[bytes] | None = None
) -> Generator[tuple[subprocess.Popen[bytes], int]]:
    """A uvicorn with one contender, whose handlers take so many seconds each; and its port.

    What it prints goes to `output`; without one, only errors are shown.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    uvicorn = [sys.executable, "-m", "uvicorn", "benchmarks.loaded:app", "--no-access-log"]
    settings = {
        "LOAD_CONTENDER": contender,
        "LOAD_DELAY": str(delay),
        "LOAD_HANDLERS": str(handlers),
    }
    process = subprocess.Popen(
        [*uvicorn, "--port", str(port), "--log-level", "error"],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.DEVNULL if output is None else output,
        stderr=output,
    )
    try:
        wait_until_ready(port, process)
        yield process, port
    finally:
        process.kill()
        process.wait()


def measure(contender: str, delay: float, *, seconds: float, connections: int) -> Result:
    """Start, load and end one server, whose requests have an event with one handler each."""
    with TemporaryDirectory() as folder:
        log = Path(folder, "output")
        with log.open("wb") as output, server(contender, delay, 1, output) as (process, port):
            time.sleep(0.5)  # let it settle, so that the memory before the load is fair
            before = resident_mb(process.pid, "VmRSS")
            load = Load(port, time.perf_counter() + seconds)
            asyncio.run(load.run(connections))
            peak = resident_mb(process.pid, "VmHWM")
            begun = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(LONGEST_END)
            except subprocess.TimeoutExpired:
                print(f"{contender} did not end within {LONGEST_END:g} s")
            end_seconds = time.perf_counter() - begun
        said = log.read_text()
    answered = len(load.latencies) - load.refused
    counters = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", said)}
    lost = answered - counters.get("handled", 0)
    # The bus's own last line, before the app's.
    pending = re.search(r"delivering before shutdown: .*?left=(\d+)", said)
    return Result(
        contender=contender,
        delay_ms=round(delay * 1000),
        requests=answered,
        per_second=len(load.latencies) / seconds,
        p50=statistics.median(load.latencies) * 1000,
        p99=statistics.quantiles(load.latencies, n=100)[98] * 1000,
        refused=load.refused,
        growth_mb=peak - before,
        pending=int(pending[1]) if pending else 0,
        end_seconds=end_seconds,
        lost=lost,
        unaccounted=lost - counters.get("undelivered", 0),
    )


def wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    """Return as soon as the server accepts a connection."""
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("the server did not start")


def resident_mb(pid: int, field: str) -> float:
    """What Linux says of a process's memory, now (VmRSS) or at most (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


COLUMNS: Sequence[tuple[str, str, Callable[[Result], float]]] = (
    ("responses/s", "{:.0f}", lambda result: result.per_second),
    ("p50 ms", "{:.1f}", lambda result: result.p50),
    ("p99 ms", "{:.0f}", lambda result: result.p99),
    ("refused (503)", "{:.0f}", lambda result: result.refused),
    ("memory growth MB", "{:.0f}", lambda result: result.growth_mb),
    ("SIGTERM to exit s", "{:.1f}", lambda result: result.end_seconds),
    ("lost", "{:.0f}", lambda result: result.lost),
    ("lost in silence", "{:.0f}", lambda result: result.unaccounted),
)


def medians(results: Sequence[Result]) -> str:
    """The medians of all runs, with the lowest and the highest in brackets."""
    head = ["handler", "contender", *(title for title, _, _ in COLUMNS)]
    rows = [
        [
            f"{delay} ms",
            contender,
            *(spread([value(run) for run in runs], form) for _, form, value in COLUMNS),
        ]
        for (delay, contender), runs in by_case(results)
    ]
    return table(head, rows, text=2)


def by_case(results: Sequence[Result]) -> Iterator[tuple[tuple[int, str], list[Result]]]:
    """The runs of each contender, by what its handler took."""
    for delay in sorted({result.delay_ms for result in results}):
        for contender in CONTENDERS:
            runs = [r for r in results if (r.delay_ms, r.contender) == (delay, contender)]
            if runs:
                yield (delay, contender), runs


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the range where there is one."""
    median, low, high = (form.format(f(values)) for f in (statistics.median, min, max))
    return median if low == high else f"{median} ({low} to {high})"


PANELS = ("responses/s", "p99 ms", "memory growth MB", "SIGTERM to exit s")


def plot(results: Sequence[Result]) -> str:
    """Four columns of the table as bars."""
    return drawing(
        [
            Panel(f"{title}, handlers of {delay} ms", list(_bars(results, delay, value)))
            for title, _, value in COLUMNS
            if title in PANELS
            for delay in sorted({result.delay_ms for result in results})
        ]
    )


def _bars(results: Sequence[Result], delay: int, value: Callable[[Result], float]) -> Iterator[Bar]:
    for (took, contender), runs in by_case(results):
        if took == delay:
            values = [value(run) for run in runs]
            found = Spread(statistics.median(values), min(values), max(values))
            yield Bar(contender, found, f"{found.median:.4g}")


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="of load, per run")
    parser.add_argument("--slow-seconds", type=float, default=30, help="the same, from 1 s up")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 0.05, 2], metavar="SECONDS")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--out", type=Path, help="a folder for load.json, load.md and load.svg")
    options = parser.parse_args()
    results: list[Result] = []
    for run in range(options.runs):
        for delay in options.delays:
            for contender in options.contenders:
                seconds = options.slow_seconds if delay >= 1 else options.seconds
                result = measure(contender, delay, seconds=seconds, connections=options.connections)
                print(f"run {run + 1}: {result}", flush=True)
                results.append(result)
    found_on = about(*PACKAGES) | {
        "load": f"{options.connections} connections, {options.runs} runs of {options.seconds:g} s "
        f"({options.slow_seconds:g} s with handlers of 1 s or more)"
    }
    print(medians(results))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        found = {"about": found_on, "results": [asdict(result) for result in results]}
        (options.out / "load.json").write_text(json.dumps(found, indent=1) + "\n")
        facts = ", ".join(f"{name} {value}" for name, value in found_on.items())
        (options.out / "load.md").write_text(f"{facts}\n\n{medians(results)}\n")
        (options.out / "load.svg").write_text(plot(results))


if __name__ == "__main__":
    main()
