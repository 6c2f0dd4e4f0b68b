"""Owns the cases: which requests are sent, and what must be true afterwards.

Every check compares moments that one process saw in order, never durations, so that a slow
machine does not fail it. Waiting ends when the trace says so. Knows nothing of drawing.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import anyio
import httpx

from examples.demo.command import OutboxCommand, Said
from examples.demo.neighbours import Mail, MailServer, Neighbourhood
from examples.demo.trace import Run, Story, Trace, clock_ns

_SECONDS_TO_FINISH = 5.0
_IDS = re.compile(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b")
_SECONDS_TO_TRY_AGAIN = 30.0


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

    @property
    def ended_ns(self) -> int:
        """When the last thing happened that follows from it."""
        ends = [run.ended_ns for run in self.story.runs]
        return max([self.received_ns, *ends, *(mail.received_ns for mail in self.mails)])

    def in_order(self) -> bool:
        """The response was sent, then the transaction committed, then handlers started."""
        story = self.story
        starts = [run.started_ns for run in story.runs]
        return bool(starts) and 0 < story.sent_ns < story.committed_ns < min(starts)


class Stage:
    """Where cases play: the shop's door, its neighbours, and the trace."""

    def __init__(self, client: httpx.AsyncClient, trace: Trace, around: Neighbourhood) -> None:
        self.mails = around.mails
        self.warehouse = around.warehouse
        self.outbox = OutboxCommand(around.settings)
        self._client = client
        self._trace = trace

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

    async def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for what new attempts bring about, or for too long."""
        return await self._trace.until(condition, seconds=_SECONDS_TO_TRY_AGAIN)

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
            mail_server=self.mails,
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
    """What a case did, and what came of it.

    Attributes:
        shots: The requests that were sent.
        checks: What must be true.
        moments: What else happened meanwhile, each with a name.
        said: What was typed at a terminal, and the answers.
    """

    shots: Sequence[Shot]
    checks: Sequence[Check]
    moments: Mapping[str, int] = field(default_factory=dict[str, int])
    said: Sequence[Said] = ()


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


async def _down(stage: Stage) -> Played:
    stage.warehouse.down = True
    before = len(stage.warehouse.reports)
    shot = await stage.order("cleo", tea=1)
    await stage.until(lambda: _outcomes_of(shot, _WEBHOOK).count("failed") == 3)
    stage.warehouse.down = False
    await stage.until(lambda: _outcomes_of(shot, _WEBHOOK)[-1] == "ok")
    attempts = shot.story.of(_WEBHOOK)
    others = [run for run in shot.story.runs if run.handler != _WEBHOOK]
    return Played(
        [shot],
        [
            _answered(201, shot),
            Check(
                "three attempts failed with the warehouse's 503, and the fourth did not",
                [(run.attempt, run.error) for run in attempts]
                == [
                    (1, "HTTPStatusError"),
                    (2, "HTTPStatusError"),
                    (3, "HTTPStatusError"),
                    (4, ""),
                ],
                _outcomes(shot),
            ),
            Check("the report has arrived once", len(stage.warehouse.reports) == before + 1),
            Check(
                "its sibling and the handlers of the next event ran once, and finished",
                sorted((run.handler, run.outcome) for run in others)
                == [
                    ("audit.write_row", "ok"),
                    ("audit.write_row", "ok"),
                    ("orders.collect_payment", "ok"),
                    ("orders.send_confirmation", "ok"),
                ],
                _outcomes(shot),
            ),
            Check("the confirmation has arrived", len(shot.mails) == 1),
        ],
    )


async def _refused(stage: Stage) -> Played:
    stage.warehouse.unknown.add("tea")
    before = len(stage.warehouse.reports)
    shot = await stage.order("gwen", tea=1)
    found_dead = [run.outcome for run in shot.story.of(_WEBHOOK)] == ["failed"]
    listed = await stage.outbox.run("list")
    letters = _IDS.findall(listed.output)
    mended_ns = clock_ns()
    stage.warehouse.unknown.clear()
    retried_ns = clock_ns()
    retried = await stage.outbox.run("retry", *letters)
    await stage.until(lambda: _outcomes_of(shot, _WEBHOOK)[-1] == "ok")
    return Played(
        [shot],
        [
            _answered(201, shot),
            Check(
                "422 is no matter of time: it is dead after one attempt, and nothing else is",
                found_dead and len(letters) == 1 and _WEBHOOK in listed.output,
                f"{listed.output}; {_outcomes(shot)}",
            ),
            Check(
                "the command had it run again",
                listed.status == retried.status == 0
                and _outcomes_of(shot, _WEBHOOK) == ["failed", "ok"],
                _outcomes(shot),
            ),
            Check("the report has arrived", len(stage.warehouse.reports) == before + 1),
        ],
        moments={"the warehouse is mended": mended_ns, "eventkit outbox retry": retried_ns},
        said=[listed, retried],
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
        _all_ended_well(shot, _WELCOME, _AUDIT),
        Check("the mail that was on its way has arrived", len(shot.mails) == 1),
    ]


async def until_its_mail_is_on_its_way(stage: Stage, shot: Shot) -> bool:
    """Wait until a sign-up is audited, and its mail is at the server, who thinks about it."""
    thinks = await anyio.to_thread.run_sync(stage.mails.thinking.wait, _SECONDS_TO_FINISH)
    return thinks and await stage.until(lambda: _outcomes_of(shot, _AUDIT) == ["ok"])


async def until_its_mail_has_arrived(stage: Stage, shot: Shot) -> None:
    """Wait until a mail is sent in a second attempt."""
    await stage.until(lambda: _outcomes_of(shot, _WELCOME)[1:] == ["ok"])


def recovered_ns(shot: Shot) -> int:
    """When the mail was sent again; 0 if it was not."""
    return max((run.started_ns for run in shot.story.of(_WELCOME)[1:]), default=0)


def recovered(shot: Shot) -> list[Check]:
    """What must be true of a sign-up whose mail was on its way when the shop was killed."""
    return [
        _answered(201, shot),
        Check(
            "the mail was on its way when the shop was killed, and another process sent it again",
            [(run.attempt, run.outcome) for run in shot.story.of(_WELCOME)]
            == [(1, "killed"), (2, "ok")],
            _outcomes(shot),
        ),
        Check("it has arrived once", _subjects(shot) == [f"Welcome, {shot.name.title()}!"]),
        Check(
            "the audit row's commit was its completion, so that did not run again",
            _outcomes_of(shot, _AUDIT) == ["ok"],
            _outcomes(shot),
        ),
    ]


CASES = (
    Case("A sign-up", "Nobody waits for the mail, and it leaves after the commit.", _sign_up),
    Case(
        "An order that conflicts",
        "The tea was taken and announced, then there were too few teapots: all is taken back.",
        _conflict,
    ),
    Case(
        "A warehouse that is down for three attempts",
        "It answers 503. The customer has tea, mail and answer anyway; the report is sent again.",
        _down,
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
    Case(
        "A report that is refused",
        "The warehouse knows no tea: 422, a dead letter. It learns, and somebody sends it again.",
        _refused,
    ),
)


_WEBHOOK, _AUDIT, _WELCOME = "orders.tell_warehouse", "audit.write_row", "users.send_welcome_mail"


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


def _outcomes_of(shot: Shot, handler: str) -> list[str]:
    return [run.outcome for run in shot.story.of(handler)]


def _ended_well(shot: Shot) -> bool:
    return bool(shot.story.runs) and all(run.outcome == "ok" for run in shot.story.runs)


def _was_discarded(run: Run) -> bool:
    return run.outcome == "discarded" and not run.started_ns


def _subjects(shot: Shot) -> list[str]:
    return [mail.subject for mail in shot.mails]
