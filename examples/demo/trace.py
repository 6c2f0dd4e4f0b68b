"""Owns what is known about each request, put together from what the shop's process tells.

The shop writes one `Record` per line (see `witness.py`). Knows nothing of drawing, nor of what
should be true.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterable, Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

import anyio

# Two processes are compared. Linux has one monotonic clock for all; elsewhere nobody promises that.
clock_ns = time.monotonic_ns if sys.platform == "linux" else time.time_ns

What = Literal[
    "up",
    "sent",
    "committed",
    "returned",
    "arrived",
    "taken",
    "accepted",
    "started",
    "ended",
    "skipped",
    "stats",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One thing that the shop's process did.

    Attributes:
        what: Which thing; the other attributes are set where they apply.
        at_ns: When it happened, by `clock_ns`.
        request: On behalf of which request.
        line: The request's method and path.
        status: The status of its response.
        delivery: The delivery's id.
        event: The name of the event's type.
        handler: The handler's name.
        attempt: Which attempt of the delivery it is.
        in_worker_thread: Whether it was published from one.
        outcome: How the attempt ended: ok, failed, discarded, undelivered or requeued.
        error: The type of the exception that the handler raised.
        port: Where the shop listens.
        stats: The bus's counters.
    """

    what: What
    at_ns: int = field(default_factory=clock_ns)
    request: str = ""
    line: str = ""
    status: int = 0
    delivery: str = ""
    event: str = ""
    handler: str = ""
    attempt: int = 0
    in_worker_thread: bool = False
    outcome: str = ""
    error: str = ""
    port: int = 0
    stats: dict[str, int] = field(default_factory=dict[str, int])

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps({name: value for name, value in asdict(self).items() if value})

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The reverse of `to_json`."""
        return cls(**json.loads(line))


@dataclass(slots=True)
class Run:
    """What became of one attempt of a delivery: one run of one handler for one event."""

    delivery: str
    event: str
    handler: str
    attempt: int
    in_worker_thread: bool
    started_ns: int = 0
    committed_ns: int = 0
    ended_ns: int = 0
    outcome: str = ""
    error: str = ""

    def add(self, record: Record) -> None:
        """Take in one more record of this attempt."""
        match record.what:
            case "started":
                self.started_ns = record.at_ns
            case "committed":
                self.committed_ns = record.at_ns
            case "ended":
                self.ended_ns = record.at_ns
                self.outcome, self.error = record.outcome, record.error
            case "skipped":
                self.outcome = record.outcome
            case _:
                pass


@dataclass(slots=True)
class Story:
    """What the shop told about one request so far; a time is 0 until it has come."""

    sent_ns: int = 0
    committed_ns: int = 0
    returned_ns: int = 0
    arrived_ns: list[int] = field(default_factory=list[int])  # messages of other services
    taken_ns: list[int] = field(default_factory=list[int])
    runs: list[Run] = field(default_factory=list[Run])

    @property
    def finished(self) -> bool:
        """The request is over, and so is everything that follows from it, but for new attempts."""
        return self.returned_ns > 0 and all(run.outcome for run in self.runs)

    def of(self, handler: str) -> list[Run]:
        """The attempts of a handler, in order."""
        return [run for run in self.runs if run.handler == handler]

    def cut_off(self, at_ns: int) -> None:
        """Nothing more will be told of what was running then: its process was killed."""
        for run in self.runs:
            if run.started_ns and not run.outcome:
                run.ended_ns, run.outcome = at_ns, "killed"

    def add(self, record: Record) -> None:
        """Take in one more record of this request."""
        if record.delivery:
            self._run_of(record).add(record)
            return
        match record.what:
            case "sent":
                self.sent_ns = record.at_ns
            case "committed":
                self.committed_ns = record.at_ns
            case "returned":
                self.returned_ns = record.at_ns
            case "arrived":
                self.arrived_ns.append(record.at_ns)
            case "taken":
                self.taken_ns.append(record.at_ns)
            case _:
                pass

    def _run_of(self, record: Record) -> Run:
        """The attempt at hand; a new one stands below the last one of the same delivery."""
        places = [place for place, run in enumerate(self.runs) if run.delivery == record.delivery]
        if places and not (record.what == "started" and self.runs[places[-1]].outcome):
            return self.runs[places[-1]]
        worker = self.runs[places[0]].in_worker_thread if places else record.in_worker_thread
        run = Run(record.delivery, record.event, record.handler, record.attempt, worker)
        self.runs.insert(places[-1] + 1 if places else len(self.runs), run)
        return run


def _ignore(_: Record) -> None:
    """Do nothing with a record but take it in."""


class Trace:
    """All stories, growing while the shop talks: one process of it after the other."""

    def __init__(self, on_record: Callable[[Record], None] = _ignore) -> None:
        self.port = 0
        self.stats: dict[str, int] = {}
        self.over = False
        self._stories: dict[str, Story] = {}
        self._on_record = on_record
        self._news = anyio.Event()

    def story(self, request: str) -> Story:
        """The story of one request, which may not have begun."""
        return self._stories.setdefault(request, Story())

    def begin(self) -> None:
        """Another process of the shop is going to talk."""
        self.port, self.stats, self.over = 0, {}, False

    async def collect(self, lines: AsyncIterable[str]) -> None:
        """Take in what the shop says until it says no more."""
        async for line in lines:
            self._add(Record.from_json(line))
            self._tell_news()
        self.over = True
        self._tell_news()

    async def until(self, condition: Callable[[], bool], *, seconds: float) -> bool:
        """Wait for the condition; False where the time or the shop has ended without it."""
        with anyio.move_on_after(seconds):
            while not condition() and not self.over:
                await self._news.wait()
        return condition()

    def _add(self, record: Record) -> None:
        match record.what:
            case "up":
                self.port = record.port
            case "stats":
                self.stats = record.stats
            case _:
                self.story(record.request).add(record)
        self._on_record(record)

    def _tell_news(self) -> None:
        self._news.set()
        self._news = anyio.Event()
