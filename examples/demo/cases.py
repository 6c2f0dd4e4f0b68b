"""Owns the cases: which requests are sent, and what must be true afterwards.

Every check compares moments that one process saw in order, never durations, so that a slow
machine does not fail it. Waiting ends when the trace says so. Knows nothing of drawing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio
import httpx

from examples.demo.neighbours import Mail, MailServer, Warehouse
from examples.demo.trace import Run, Story, Trace, clock_ns

_SECONDS_TO_FINISH = 5.0


@dataclass(frozen=True, slots=True)
class Shot:
    """One request, seen from outside and from inside; times are those of `clock_ns`.

    Its story and its mails may still grow.
    """

    name: str
    line: str
    status: int
    begun_ns: int
    received_ns: int
    story: Story
    mail_server: MailServer

    @property
    def mails(self) -> Sequence[Mail]:
        """What has arrived because of it."""
        return self.mail_server.to(_address(self.name))

    def in_order(self) -> bool:
        """The response was sent, then the transaction committed, then handlers started."""
        story = self.story
        starts = [run.started_ns for run in story.runs]
        return bool(starts) and 0 < story.sent_ns < story.committed_ns < min(starts)


class Stage:
    """Where cases play: the shop's door, its neighbours, and the trace."""

    def __init__(
        self, client: httpx.AsyncClient, trace: Trace, mails: MailServer, warehouse: Warehouse
    ) -> None:
        self.warehouse = warehouse
        self._client = client
        self._trace = trace
        self._mails = mails

    async def sign_up(self, name: str) -> Shot:
        """Become a user of the shop."""
        return await self._finished(await self.start_sign_up(name))

    async def start_sign_up(self, name: str) -> Shot:
        """Become a user, and leave with the answer while the rest is still to come."""
        return await self._send("/users", name, {"name": name.title()})

    async def order(self, name: str, **quantities: int) -> Shot:
        """Order so many of each."""
        lines = [{"sku": sku, "quantity": quantity} for sku, quantity in quantities.items()]
        return await self._finished(await self._send("/orders", name, {"lines": lines}))

    async def check(self, name: str, **quantities: int) -> Shot:
        """Ask whether so many of each could be ordered."""
        lines = [{"sku": sku, "quantity": quantity} for sku, quantity in quantities.items()]
        return await self._finished(await self._send("/orders/check", name, {"lines": lines}))

    async def reserve(self, name: str, sku: str) -> Shot:
        """Have one put aside, or wait for it."""
        return await self._finished(await self._send("/reservations", name, {"sku": sku}))

    async def _send(self, path: str, name: str, form: dict[str, object]) -> Shot:
        """Send one request, and return with the answer."""
        begun_ns = clock_ns()
        response = await self._client.post(
            path, json={"email": _address(name), **form}, headers={"x-request-id": name}
        )
        received_ns = clock_ns()
        return Shot(
            name=name,
            line=f"POST {path}",
            status=response.status_code,
            begun_ns=begun_ns,
            received_ns=received_ns,
            story=self._trace.story(name),
            mail_server=self._mails,
        )

    async def _finished(self, shot: Shot) -> Shot:
        """Wait until all that follows from the request has ended, or for too long."""
        await self._trace.until(lambda: shot.story.finished, seconds=_SECONDS_TO_FINISH)
        return shot


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must be true, in words, whether it is, and what is found if it is not."""

    text: str
    holds: bool
    found: str = ""


@dataclass(frozen=True, slots=True)
class Played:
    """What a case did, and what came of it."""

    shots: Sequence[Shot]
    checks: Sequence[Check]


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to watch."""

    title: str
    about: str
    play: Callable[[Stage], Awaitable[Played]]


async def _sign_up(stage: Stage) -> Played:
    shot = await stage.sign_up("ada")
    return Played(
        [shot],
        [
            _answered(201, shot),
            _in_order(shot),
            _all_ended_well(shot, "users.send_welcome_mail", "audit.write_row"),
            Check("the welcome mail has arrived", _subjects(shot) == ["Welcome, Ada!"]),
        ],
    )


async def _conflict(stage: Stage) -> Played:
    before = len(stage.warehouse.reports)
    shot = await stage.order("bob", tea=2, teapot=5)
    heard = len(stage.warehouse.reports) - before
    return Played([shot], [_answered(409, shot), *_came_to_nothing(shot, heard)])


async def _failure(stage: Stage) -> Played:
    stage.warehouse.down = True
    shot = await stage.order("cleo", tea=1)
    stage.warehouse.down = False
    failed = [run for run in shot.story.runs if run.outcome == "failed"]
    ended_well = [run.handler for run in shot.story.runs if run.outcome == "ok"]
    return Played(
        [shot],
        [
            _answered(201, shot),
            Check(
                "only the webhook failed, with the warehouse's 503",
                [(run.handler, run.error) for run in failed]
                == [("orders.tell_warehouse", "HTTPStatusError")],
                _outcomes(shot),
            ),
            Check(
                "its sibling and the handlers of the next event finished",
                sorted(ended_well)
                == [
                    "audit.write_row",
                    "audit.write_row",
                    "orders.collect_payment",
                    "orders.send_confirmation",
                ],
                _outcomes(shot),
            ),
            Check("the confirmation has arrived", len(shot.mails) == 1),
        ],
    )


async def _plain_def(stage: Stage) -> Played:
    before = len(stage.warehouse.reports)
    shot = await stage.order("dora", teapot=1)
    return Played(
        [shot],
        [
            _answered(201, shot),
            Check(
                "it published from a worker thread",
                all(run.in_worker_thread for run in shot.story.runs),
            ),
            _in_order(shot),
            _all_ended_well(
                shot,
                "orders.tell_warehouse",
                "orders.send_confirmation",
                "orders.collect_payment",
                "audit.write_row",
            ),
            Check(
                "the confirmation and the warehouse's report have arrived",
                len(shot.mails) == 1 and len(stage.warehouse.reports) == before + 1,
            ),
        ],
    )


async def _rolled_back(stage: Stage) -> Played:
    before = len(stage.warehouse.reports)
    shot = await stage.check("eve", tea=1)
    heard = len(stage.warehouse.reports) - before
    return Played([shot], [_answered(200, shot), *_came_to_nothing(shot, heard)])


async def _too_late(stage: Stage) -> Played:
    shot = await stage.reserve("finn", "teapot")
    return Played(
        [shot],
        [_answered(409, shot), _in_order(shot), _all_ended_well(shot, "audit.write_row")],
    )


async def _ten_at_once(stage: Stage) -> Played:
    shots: list[Shot] = []

    async def sign_up(number: int) -> None:
        shots.append(await stage.sign_up(f"guest-{number}"))

    async with anyio.create_task_group() as tasks:
        for number in range(1, 11):
            tasks.start_soon(sign_up, number)
    return Played(
        shots,
        [
            Check("ten answers 201", [shot.status for shot in shots] == [201] * 10),
            Check(
                "each: response sent → committed → handlers started",
                all(shot.in_order() for shot in shots),
            ),
            Check(
                "each got one mail, and every handler ended well",
                all(len(shot.mails) == 1 and _ended_well(shot) for shot in shots),
            ),
        ],
    )


def last_words(shot: Shot) -> list[Check]:
    """What must be true of a sign-up on whose heels the shop was told to end."""
    starts = [run.started_ns for run in shot.story.runs]
    return [
        _in_order(shot),
        Check(
            "no request waited for them, so it was the application's shutdown that did",
            bool(starts) and 0 < shot.story.returned_ns < min(starts),
        ),
        _all_ended_well(shot, "users.send_welcome_mail", "audit.write_row"),
        Check("the mail that was on its way has arrived", len(shot.mails) == 1),
    ]


CASES = (
    Case("A sign-up", "Nobody waits for the mail, and it leaves after the commit.", _sign_up),
    Case(
        "An order that conflicts",
        "The tea was taken and announced, then there were too few teapots: all is taken back.",
        _conflict,
    ),
    Case(
        "A handler that fails",
        "The warehouse answers 503. The customer has the tea, the mail and an answer anyway.",
        _failure,
    ),
    Case(
        "A plain def endpoint",
        "The same order with the warehouse up: published in a worker thread, delivered the same.",
        _plain_def,
    ),
    Case(
        "A 200 after a rollback",
        "Could I have one? The order was placed for a moment, and rolled back: nobody hears of it.",
        _rolled_back,
    ),
    Case(
        "A 409 after a commit",
        "Too late for the last teapot, but on the waiting list: that is committed, and audited.",
        _too_late,
    ),
    Case(
        "Ten sign-ups at once",
        "Each keeps its own events and its own order. The stairs: SQLite has one writer.",
        _ten_at_once,
    ),
)


def _address(name: str) -> str:
    return f"{name}@example.com"


def _answered(status: int, shot: Shot) -> Check:
    return Check(f"the answer is {status}", shot.status == status, str(shot.status))


def _in_order(shot: Shot) -> Check:
    return Check("response sent → committed → handlers started", shot.in_order())


def _all_ended_well(shot: Shot, *handlers: str) -> Check:
    ran = {run.handler for run in shot.story.runs}
    return Check(
        "every handler ended well", ran == set(handlers) and _ended_well(shot), _outcomes(shot)
    )


def _came_to_nothing(shot: Shot, heard: int) -> Sequence[Check]:
    """What holds of a transaction that was rolled back; `heard` are the warehouse's reports."""
    runs = shot.story.runs
    return [
        Check("nothing was committed", not shot.story.committed_ns),
        Check(
            "what was published was discarded, no handler started",
            bool(runs) and all(_was_discarded(run) for run in runs),
        ),
        Check("no mail, and the warehouse heard nothing", not shot.mails and not heard),
    ]


def _outcomes(shot: Shot) -> str:
    runs = shot.story.runs
    return ", ".join(f"{run.handler}: {run.outcome or 'no end'}" for run in runs) or "none ran"


def _ended_well(shot: Shot) -> bool:
    return bool(shot.story.runs) and all(run.outcome == "ok" for run in shot.story.runs)


def _was_discarded(run: Run) -> bool:
    return run.outcome == "discarded" and not run.started_ns


def _subjects(shot: Shot) -> list[str]:
    return [mail.subject for mail in shot.mails]
