"""What is known in memory of rows, and what an outbox does where there is no table."""

import logging
from dataclasses import dataclass

import anyio
import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from eventkit import DomainEvent, DrainReport, Durable, EventBus
from eventkit._cli import _show
from eventkit.outbox import Outbox, _holdings
from eventkit.outbox._rows import describe
from tests.contract.bus import all_tasks_blocked
from tests.outbox.scenes import Placed, Scene

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Scripted:
    number: int


Scripted.__module__ = "__main__"


@dataclass(frozen=True, slots=True)
class Shipped(DomainEvent):
    number: int


async def mail(event: object) -> None: ...


async def fails(event: object) -> None:
    raise LookupError


async def test_what_is_not_written_yet_waits_here(bus: EventBus, outbox: Outbox) -> None:
    bus.subscribe(Placed, mail, durable=True, name="mail")

    async with bus.context() as unit:
        bus.publish(Placed())
        assert "1 pending" in repr(unit)
        unit.discard()


def test_an_error_that_was_never_raised_is_named_without_a_line() -> None:
    assert describe(ValueError("secret")) == "builtins.ValueError"


def test_a_time_is_shown_in_its_largest_unit() -> None:
    assert [_show._span(seconds) for seconds in (0.4, 59.9, 90.0)] == ["0 s", "59 s", "1 m"]


async def test_an_event_that_has_an_id_keeps_it_in_the_table(bus: EventBus, outbox: Outbox) -> None:
    placed = Shipped(7)
    bus.subscribe(Shipped, fails, durable=True, name="fails")

    async with bus.context():
        bus.publish(placed)

    (kept,) = await outbox.deliveries("ready")
    assert kept.event_id == placed.event_id


async def test_a_key_that_postgresql_cannot_store_is_refused_at_publish(
    bus: EventBus, outbox: Outbox
) -> None:
    bus.subscribe(Placed, mail, durable=Durable(key=lambda event: "a\0b"), name="mail")

    async with bus.context():
        with pytest.raises(ValueError, match="key of durable handler mail has a null character"):
            bus.publish(Placed())


def test_names_of_a_script_are_warned_of_once(
    bus: EventBus, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    bus.subscribe(Scripted, mail, durable=True, name="mail")
    bus.subscribe(Scripted, other_mail, durable=True, name="other")

    (line,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "names=__main__:Scripted" in line.getMessage()


async def other_mail(event: object) -> None: ...


async def test_in_memory_nothing_runs_from_a_table(bus: EventBus) -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with Outbox(bus, engine) as outbox:
        assert await outbox.run_due() == DrainReport(0, ())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outbox.run)
            await all_tasks_blocked()
            tasks.cancel_scope.cancel()
    engine.dispose()


def test_a_scoped_session_leads_to_its_engine(bus: EventBus, scene: Scene) -> None:
    if scene.awaits:
        pytest.skip("as with sessions that block")
    sessions = scoped_session(sessionmaker(scene.hooks))
    with Outbox(bus, sessions, schema=scene.schema) as outbox:
        assert outbox.bus is bus
    sessions.remove()


def test_what_a_forked_child_had_from_its_parent_is_forgotten(outbox: Outbox) -> None:
    _holdings._after_fork_in_child()

    assert not outbox.healthy
