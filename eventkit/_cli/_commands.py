"""Owns the commands and their options. The outbox does the work, and `_show` prints it."""

from __future__ import annotations

import re
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import anyio
import click

from eventkit._cli import _relay, _show
from eventkit._cli._problems import (
    EXIT_CODES,
    Failure,
    Mistake,
    asking_the_database,
    schema_problem,
)
from eventkit._cli._targets import find, outbox_of
from eventkit.exceptions import OutboxSchemaError

if TYPE_CHECKING:
    from eventkit.outbox import Outbox

_Result = TypeVar("_Result")
_SETTINGS = {"help_option_names": ["-h", "--help"]}
_STATES = ("ready", "leased", "unreadable", "dead")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")


def _age(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    """Read a number and a unit, in seconds."""
    if value is None:
        return None
    found = _AGE.fullmatch(value)
    if found is None:
        raise click.BadParameter(
            f"'{value}' is no age: give a number and a unit (s, m, h, d or w), such as 30d"
        )
    return float(found[1]) * _SECONDS[found[2]]


_target = click.argument("target", metavar="MODULE:ATTR")
_ids = click.argument("ids", metavar="[ID]...", type=click.UUID, nargs=-1)
_handler = click.option("--handler", metavar="NAME", help="Only deliveries to this handler.")
_before = click.option(
    "--before",
    metavar="AGE",
    callback=_age,
    help="Only events older than this: 90s, 15m, 6h, 30d, 2w.",
)
_json = click.option("--json", "json", is_flag=True, help="Write one JSON document.")


@click.group(context_settings=_SETTINGS, epilog=EXIT_CODES)
def eventkit() -> None:
    """Run and manage the durable deliveries of an outbox.

    MODULE:ATTR is the outbox, such as shop.main:outbox, or the ASGI app of the outbox. The command
    imports the module. The current directory is searched, too.
    """


@eventkit.command(epilog=EXIT_CODES)
@_target
@click.option("--concurrency", type=click.IntRange(min=1), help="How many deliveries run at once.")
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Time for running handlers at the end. Default: the timeout of the app, or 20.",
)
@click.option(
    "--loop",
    type=click.Choice(["asyncio", "trio", "uvloop"]),
    default="asyncio",
    show_default=True,
    help="The event loop.",
)
def relay(target: str, concurrency: int | None, shutdown_timeout: float | None, loop: str) -> None:
    """Run due deliveries, until SIGTERM or Ctrl-C.

    Give an app if handlers need its lifespan: the command runs the lifespan and serves no requests.
    At the end, running handlers may finish. The other deliveries go back to the table. A second
    signal ends the process at once.
    """
    try:
        with _relay.interruptible():
            _relay.run(
                target,
                find(target),
                loop=loop,
                concurrency=concurrency,
                shutdown_timeout=shutdown_timeout,
            )
    except OutboxSchemaError as error:
        raise schema_problem(error) from error


@eventkit.group(epilog=EXIT_CODES)
def outbox() -> None:
    """Show stored deliveries, retry them, or drop them."""


@outbox.command(epilog=EXIT_CODES)
@_target
@_json
def stats(target: str, json: bool) -> None:
    """Count deliveries by state and handler.

    "unknown" counts due deliveries with a handler or an event that this program does not have.
    """
    with outbox_of(target) as box:
        found = _ask(box, box.stats)
    if json:
        handlers = {name: _show.stats_document(each) for name, each in found.handlers.items()}
        _show.as_json({**_show.stats_document(found), "handlers": handlers})
    else:
        _show.show_stats(found)


@outbox.command("list", epilog=EXIT_CODES)
@_target
@click.option(
    "--state",
    type=click.Choice([*_STATES, "all"]),
    default="dead",
    show_default=True,
    help="Only deliveries in this state.",
)
@_handler
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="How many at most."
)
@_json
def list_(target: str, state: str, handler: str | None, limit: int, json: bool) -> None:
    """List deliveries, the longest due first.

    The list does not show the contents of events.
    """
    with outbox_of(target) as box:
        chosen = None if state == "all" else state
        found = _ask(box, lambda: box.deliveries(chosen, handler, limit))
    if json:
        _show.as_json([_show.delivery_document(each, payload=False) for each in found])
    elif found:
        _show.show_list(found)
    else:
        every = "" if chosen is None else "; --state all lists the others"
        click.echo(f"there are no {chosen or 'such'} deliveries{every}", err=True)
    if len(found) == limit:
        click.echo(f"there may be more than {limit}: give a higher --limit", err=True)


@outbox.command(epilog=EXIT_CODES)
@_target
@click.argument("id", type=click.UUID)
@click.option("--payload", is_flag=True, help="Also show the stored event.")
@_json
def show(target: str, id: UUID, payload: bool, json: bool) -> None:
    """Show one delivery."""
    with outbox_of(target) as box:
        found = _ask(box, lambda: box.get(id))
    if found is None:
        raise Failure(f"there is no delivery {id}: it has ended, or was dropped")
    if json:
        _show.as_json(_show.delivery_document(found, payload=payload))
    else:
        _show.show_delivery(found, payload=payload)


@outbox.command(epilog=EXIT_CODES)
@_target
@_ids
@_handler
@_before
@_json
def retry(
    target: str, ids: tuple[UUID, ...], handler: str | None, before: float | None, json: bool
) -> None:
    """Retry dead and unreadable deliveries.

    Their attempts are counted from one again. Other deliveries run or will run by themselves.
    """
    chosen = _chosen("retry", ids, handler=handler, before=before)
    with outbox_of(target) as box:
        counts = _ask(box, lambda: box.count(**chosen))
        total = sum(n for (_, state), n in counts.items() if state in {"dead", "unreadable"})
        with _show.progress("retrying", total) as tell:
            retried = _ask(box, lambda: box.retry(**chosen, progress=tell))
    _report(json, "retried", retried, ids, "not dead or unreadable")


@outbox.command(epilog=EXIT_CODES)
@_target
@_ids
@_handler
@_before
@click.option(
    "--state",
    type=click.Choice([each for each in _STATES if each != "leased"]),
    help="Only deliveries in this state.",
)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@_json
def drop(
    target: str,
    ids: tuple[UUID, ...],
    handler: str | None,
    before: float | None,
    state: str | None,
    yes: bool,
    json: bool,
) -> None:
    """Delete deliveries permanently.

    The command shows the numbers, and asks. Running deliveries stay.
    """
    chosen = _chosen("drop", ids, handler=handler, before=before)
    if not yes and not _can_ask():
        raise Mistake("drop asks before it deletes, and there is no terminal: give --yes")
    with outbox_of(target) as box:
        counts = _ask(box, lambda: box.count(**chosen))
        wanted = {
            (name, each): n
            for (name, each), n in counts.items()
            if each != "leased" and state in (None, each)
        }
        dropped, total = 0, sum(wanted.values())
        if total and not yes:
            _show.show_counts(wanted)
            click.confirm(f"Delete these {total} permanently?", abort=True, err=True)
        if total:
            with _show.progress("dropping", total) as tell:
                dropped = _ask(box, lambda: box.drop(**chosen, state=state, progress=tell))
    _report(json, "dropped", dropped, ids, f"not {state}" if state else "running")


@outbox.command(epilog=EXIT_CODES)
@_target
@_json
def schema(target: str, json: bool) -> None:
    """Print the SQL statements that make the tables."""
    with outbox_of(target) as box:
        statements = box.schema()
    if json:
        _show.as_json({"schema": statements})
    else:
        click.echo(statements, nl=False)


def _ask(box: Outbox, question: Callable[[], Awaitable[_Result]]) -> _Result:
    """Check the tables, and ask the outbox, on an event loop of its own."""
    from eventkit.outbox._outbox import holdings_of

    async def ask() -> _Result:
        if holdings_of(box).database.is_in_memory:
            raise Mistake("this outbox has SQLite in memory, which belongs to another process")
        await holdings_of(box).check()
        return await question()

    with asking_the_database():
        return anyio.run(ask)


def _can_ask() -> bool:
    """Say whether there is a terminal to ask on."""
    return sys.stdin.isatty()


def _chosen(operation: str, ids: Iterable[UUID], **others: object) -> dict[str, Any]:
    """Return the chosen deliveries as arguments. Any: they have several types."""
    chosen: dict[str, Any] = {"ids": [*ids] or None, **others}
    if all(value is None for value in chosen.values()):
        raise Mistake(
            f"{operation} which deliveries? Give IDs, --handler or --before. --before 0s means all"
        )
    return chosen


def _report(json: bool, done: str, count: int, ids: Iterable[UUID], why_not: str) -> None:
    """Print the number; fail if some of the given ids are not among them."""
    if json:
        _show.as_json({done: count})
    else:
        click.echo(f"{done} {count}")
    missing = len({*ids}) - count
    if missing > 0:
        raise Failure(f"{missing} of the given deliveries: {why_not}, or no longer stored")
