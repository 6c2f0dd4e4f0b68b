"""Owns the course of this demo: what is sent, what is killed, and what must be true afterwards."""

from __future__ import annotations

import signal
import sqlite3
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
from anyio.abc import Process
from rich.console import Console

from eventkit.wire import encode
from examples.demo.cases import Check
from examples.demo.process import ShopDidNotStart, kill, telling_process, until_up
from examples.demo.report import Report
from examples.demo.spans import SpanFile
from examples.demo.timeline import JOURNEY_LEGEND, Journey
from examples.demo.trace import Run, Story, Trace, clock_ns
from examples.demo.two_services.broker import (
    MISSING,
    BrokerAtHand,
    Letter,
    Neighbour,
    NoBroker,
    broker_at_hand,
    neighbour,
)
from examples.two_services.shop_events import OrderPlaced

_SECONDS_TO_FINISH = 10.0
_LEASE = 1.5  # seconds; the least that there is, so that others take over soon
_FORWARD, _INVOICE = "forward:shop.order.placed.v1", "billing.write_invoice"
_HELD = "bob"  # whose invoice is being written when billing is killed


async def play(console: Console) -> bool:
    """Show the two services; True if everything happened as told, or if there is no broker."""
    return await put_up(console, _play_all)


async def put_up(console: Console, course: Course, *, traced: bool = False) -> bool:
    """Find a broker, run the course, and sum up.

    Args:
        console: Where it is shown.
        course: What is shown.
        traced: Whether the services write their spans.

    Returns:
        Whether everything happened as told; also True if there is no broker, and none was named.
    """
    with tempfile.TemporaryDirectory(prefix="eventkit-demo-") as name:
        folder = Path(name)
        try:
            async with broker_at_hand(folder) as at_hand:
                log = folder / "services.log"
                with log.open("w") as file:
                    stage = Stage(at_hand, folder, file, traced=traced)
                    return await _run(Report(console), stage, course, log)
        except NoBroker as none:
            console.print("", f"Nothing is shown: {none}.", "", MISSING, sep="\n", markup=False)
            return not none.was_named


async def _run(report: Report, stage: Stage, course: Course, log: Path) -> bool:
    try:
        await course(report, stage)
    except* (ShopDidNotStart, httpx.HTTPError) as errors:
        gone = Check("the services are there and answer", holds=False, found=repr(errors))
        report.results.append(("The services", [gone]))
    return report.summary(log)


class Service:
    """One of the two, through all of its processes.

    Attributes:
        database: Its file.
        trace: What its processes have told.
    """

    def __init__(
        self,
        name: str,
        at_hand: BrokerAtHand,
        folder: Path,
        log: IO[str],
        environment: Mapping[str, str],
    ) -> None:
        self.database = folder / f"{name}.db"
        self.trace = Trace()
        self._name = name
        self._log = log
        self._environment = {
            **at_hand.environment,
            **environment,
            f"{name.upper()}_DATABASE": f"sqlite+aiosqlite:///{self.database}",
            "OUTBOX_LEASE": str(_LEASE),
        }

    @asynccontextmanager
    async def running(self, *, holds: str = "") -> AsyncGenerator[Process]:
        """Run a process of it; handlers on behalf of `holds` do not come to their commit."""
        command = ["examples.demo.two_services.server", self._name]
        environment = {**self._environment, "DEMO_HOLDS": holds}
        async with telling_process(command, environment, self.trace, self._log) as process:
            yield process

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.trace.port}{path}"

    async def is_healthy(self) -> bool:
        """What a probe would ask."""
        async with httpx.AsyncClient() as client:
            return (await client.get(self.url("/healthz"))).status_code == 200

    async def until_ended(self, story: Story, handler: str, *, taken: int = 0) -> None:
        """Wait until a handler has ended well, and messages are taken in; or for too long."""
        await self.trace.until(
            lambda: "ok" in _outcomes(story, handler) and len(story.taken_ns) >= taken,
            seconds=_SECONDS_TO_FINISH,
        )

    def column(self, query: str) -> list[int]:
        """Read what is committed, in a connection of our own."""
        with closing(sqlite3.connect(self.database)) as connection:
            return [value for (value,) in connection.execute(query)]

    def kept(self) -> int:
        """How many deliveries its outbox has still."""
        return self.column("SELECT count(*) FROM eventkit_outbox")[0]


class Stage:
    """The two services and their broker.

    Attributes:
        spans: What OpenTelemetry sees, if the services are traced.
    """

    def __init__(
        self, at_hand: BrokerAtHand, folder: Path, log: IO[str], *, traced: bool = False
    ) -> None:
        self.at_hand = at_hand
        self.spans = SpanFile(folder / "spans.jsonl")
        environment = {"DEMO_SPANS": str(self.spans.path)} if traced else {}
        self.orders = Service("orders", at_hand, folder, log, environment)
        self.billing = Service("billing", at_hand, folder, log, environment)

    async def place(self, name: str, order_id: int) -> Way:
        """Place an order, and leave with the answer while the rest is still to come."""
        begun_ns = clock_ns()
        async with httpx.AsyncClient() as client:
            response = await client.post(
                self.orders.url(f"/orders/{order_id}"),
                json={"customer": name, "total_cents": 990},
                headers={"x-request-id": name},
            )
        return Way(
            order_id,
            begun_ns,
            clock_ns(),
            response.status_code,
            self.orders.trace.story(name),
            self.billing.trace.story(name),
        )

    async def finish(self, way: Way) -> None:
        """Wait until an order has its invoice, or for too long."""
        await self.orders.until_ended(way.ordered, _FORWARD)
        await self.billing.until_ended(way.billed, _INVOICE, taken=1)

    def invoices(self, order_id: int) -> int:
        """How many an order has."""
        return self.billing.column("SELECT order_id FROM invoices").count(order_id)


@dataclass(frozen=True, slots=True)
class Way:
    """An order on its way: its request, and what both services have told of it so far."""

    order_id: int
    begun_ns: int
    received_ns: int
    status: int
    ordered: Story
    billed: Story

    def drawn(self, moments: Mapping[str, int] | None = None) -> Journey:
        """Its way through both services; `moments` are what else happened meanwhile."""
        journey = Journey(self.begun_ns)
        journey.part("orders")
        line = f"POST /orders/{self.order_id}"
        journey.waited(line, self.begun_ns, self.received_ns, str(self.status))
        journey.committed("order committed", self.ordered.committed_ns)
        for run in self.ordered.of(_FORWARD):
            journey.run("forwarded", run, "confirmed")
        _draw_billing(journey, self.billed)
        if moments:
            journey.part("meanwhile")
        for label, at_ns in (moments or {}).items():
            journey.moment(label, at_ns)
        return journey

    def went_in_order(self) -> Check:
        """Compare moments of two processes, which share a clock."""
        forward = self.ordered.of(_FORWARD)
        invoice = self.billed.of(_INVOICE)
        moments = [
            self.ordered.committed_ns,
            *(run.started_ns for run in forward[:1]),
            *self.billed.arrived_ns[:1],
            *(run.started_ns for run in invoice[:1]),
            *(run.committed_ns for run in invoice[-1:]),
        ]
        return Check(
            "committed in orders → forwarded → arrived in billing → handler started → invoice "
            "committed",
            len(moments) == 5 and all(moments) and moments == sorted(moments),
            repr(moments),
        )

    def was_confirmed(self) -> Check:
        """The forward is a handler, and ends well when the broker has confirmed."""
        outcomes = _outcomes(self.ordered, _FORWARD)
        return Check("the broker has confirmed it, at the first attempt", outcomes == ["ok"])


Course = Callable[[Report, Stage], Awaitable[None]]


async def _play_all(report: Report, stage: Stage) -> None:
    orders, billing = stage.orders, stage.billing
    async with orders.running() as taking:
        async with billing.running(holds=_HELD) as doomed:
            await until_up(orders.trace)
            await until_up(billing.trace)
            # The first request of a process pays for what is imported when it is used.
            await stage.finish(await stage.place("zoe", 0))
            report.opening(
                f"orders is process {taking.pid}, billing {doomed.pid}; {stage.at_hand}.",
                JOURNEY_LEGEND,
            )
            await _show_order(report, stage)
            way, killed_ns = await _kill_in_the_middle(stage, doomed)
        async with billing.running() as writing, neighbour(stage.at_hand) as somebody:
            await until_up(billing.trace)
            up_ns = clock_ns()
            await stage.finish(way)
            _show_killed(report, stage, way, doomed, {"SIGKILL": killed_ns, "up again": up_ns})
            await _show_twice(report, stage, somebody)
            await _show_unreadable(report, stage, somebody)
    endings = [process.returncode for process in (taking, writing)]
    report.section(
        "5  Told to end",
        "SIGTERM: what is at hand is finished, and nothing is left for later.",
        None,
        [
            Check(
                "both services ended on SIGTERM",
                all(ending in (0, -signal.SIGTERM) for ending in endings),
                repr(endings),
            ),
            Check(
                "each order has one invoice",
                billing.column("SELECT order_id FROM invoices ORDER BY 1") == [0, 1, 2, 3, 4],
            ),
            Check("nothing is left in either outbox", orders.kept() == billing.kept() == 0),
        ],
    )


async def _show_order(report: Report, stage: Stage) -> None:
    way = await stage.place("ada", 1)
    await stage.finish(way)
    healthy = await stage.orders.is_healthy() and await stage.billing.is_healthy()
    report.section(
        "1  An order, and its invoice",
        "The event is written with the order. The broker has it before orders forgets it; billing "
        "has written\nit down before the broker forgets it.",
        way.drawn(),
        [
            Check("answered 201", way.status == 201, str(way.status)),
            way.was_confirmed(),
            way.went_in_order(),
            Check("there is one invoice", stage.invoices(1) == 1),
            Check("both services say that they are healthy", healthy),
        ],
    )


async def _kill_in_the_middle(stage: Stage, doomed: Process) -> tuple[Way, int]:
    """Kill billing when it has taken an order in, and writes its invoice."""
    way = await stage.place(_HELD, 2)
    await stage.billing.trace.until(
        lambda: bool(way.billed.taken_ns) and any(run.started_ns for run in way.billed.runs),
        seconds=_SECONDS_TO_FINISH,
    )
    killed_ns = clock_ns()
    await kill(doomed)
    way.billed.cut_off(killed_ns)
    return way, killed_ns


def _show_killed(
    report: Report, stage: Stage, way: Way, doomed: Process, moments: Mapping[str, int]
) -> None:
    attempts = [(run.attempt, run.outcome) for run in way.billed.of(_INVOICE)]
    report.section(
        "2  Killed in the middle, and started again",
        "SIGKILL comes while the invoice is written. The broker has done its part; billing's "
        f"table still has\nthe event, leased for {_LEASE:g} s.",
        way.drawn(moments),
        [
            Check("SIGKILL ended billing", doomed.returncode == -signal.SIGKILL),
            Check("it had taken the message in before", bool(way.billed.taken_ns)),
            Check(
                "the handler was running, and the new process ran it again",
                attempts == [(1, "killed"), (2, "ok")],
                repr(attempts),
            ),
            Check("there is one invoice", stage.invoices(2) == 1, str(stage.invoices(2))),
        ],
    )


async def _show_twice(report: Report, stage: Stage, somebody: Neighbour) -> None:
    name, billed = "cleo", stage.billing.trace.story("cleo")
    wired = encode(OrderPlaced(3, name, 990), source="/orders")
    # Without the header by which JetStream itself would drop the second one.
    sent = [await somebody.send(name, wired.body, wired.headers()) for _ in range(2)]
    await stage.billing.until_ended(billed, _INVOICE, taken=2)
    journey = Journey(sent[0])
    journey.part("somebody")
    for at_ns in sent:
        journey.moment("message sent", at_ns)
    _draw_billing(journey, billed)
    report.section(
        "3  Sent twice",
        "The same message comes twice, as where a confirmation is lost. The inbox has its id.",
        journey,
        [
            Check(
                "it arrived twice, and was taken from the broker twice",
                len(billed.arrived_ns) == len(billed.taken_ns) == 2,
            ),
            Check(
                "the handler ran once",
                _outcomes(billed, _INVOICE) == ["ok"],
                repr(_outcomes(billed, _INVOICE)),
            ),
            Check("there is one invoice", stage.invoices(3) == 1, str(stage.invoices(3))),
        ],
    )


async def _show_unreadable(report: Report, stage: Stage, somebody: Neighbour) -> None:
    name, billed = "dora", stage.billing.trace.story("dora")
    wired = encode(OrderPlaced(5, name, 990), source="/orders")
    body = wired.body.replace(b'":990', b'":"some"')
    sent_ns = await somebody.send(name, body, wired.headers())
    await somebody.until_letters(1)
    await stage.billing.trace.until(lambda: bool(billed.taken_ns), seconds=_SECONDS_TO_FINISH)
    way = await stage.place("eve", 4)
    await stage.finish(way)
    letters = somebody.letters
    journey = Journey(sent_ns)
    journey.part("somebody")
    journey.moment("message sent", sent_ns)
    _draw_billing(journey, billed, taken="put aside")
    journey.part("who reads dead letters")
    for letter in letters:
        journey.moment("dead letter", letter.seen_ns)
    report.section(
        "4  What nobody can read",
        "An order whose total is no number. It would never become one, so it is put aside.",
        journey,
        [
            Check("billing took it from the broker", len(billed.taken_ns) == 1),
            *_dead(letters, body),
            Check("no handler ran, and there is no invoice", not billed.runs),
            Check("the order after it has its invoice", stage.invoices(4) == 1),
        ],
    )


def _dead(letters: Sequence[Letter], body: bytes) -> list[Check]:
    """What must be true of the one dead letter."""
    headers: Mapping[str, str] = letters[0].headers if letters else {}
    reason, error = headers.get("eventkit-reason", ""), headers.get("eventkit-error", "")
    return [
        Check(
            "one dead letter came, with the message as it was",
            [letter.body for letter in letters] == [body],
            f"{len(letters)} came",
        ),
        Check(
            f"it says why: {reason}: {error}",
            reason == "undecodable" and "total_cents" in error and "some" not in error,
        ),
    ]


def _draw_billing(journey: Journey, billed: Story, taken: str = "taken in") -> None:
    journey.part("billing")
    for number, arrived_ns in enumerate(billed.arrived_ns):
        journey.moment("message arrived", arrived_ns)
        for taken_ns in billed.taken_ns[number : number + 1]:
            journey.moment(taken, taken_ns)
    for run in billed.of(_INVOICE):
        journey.run(_label(run), run, "committed")


def _label(run: Run) -> str:
    return "invoice written" if run.attempt == 1 else f"  attempt {run.attempt}"


def _outcomes(story: Story, handler: str) -> list[str]:
    return [run.outcome for run in story.of(handler)]
