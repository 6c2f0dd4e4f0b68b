"""Tests of users whose application has an outbox: `capevents`, TestClient, `in_memory`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from eventkit import EventBus
from eventkit.outbox import Outbox
from eventkit.outbox._store import State
from eventkit.starlette import EventContextMiddleware
from eventkit.testing import EventCapture
from tests.asgi import client_of
from tests.conftest import Backend
from tests.kit.test_plugin import is_installed
from tests.outbox.scenes import Paid, Placed, Scene
from tests.sqlalchemy.steps import done, put


@pytest.fixture(autouse=True)
def _captured(request: pytest.FixtureRequest) -> None:
    if "scene" in request.fixturenames:
        request.getfixturevalue("scene").is_counted = False


@pytest.fixture
def seen(bus: EventBus) -> list[str]:
    """What handlers have done: a durable one, and another one that it causes."""
    seen: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        seen.append(f"mail {event.name}")
        bus.publish(Paid(event.name))

    @bus.on(Paid, durable=True, name="bill")
    def bill(event: Paid) -> None:
        seen.append(f"bill {event.name}")

    return seen


@pytest.fixture
def events(bus: EventBus) -> Iterator[EventCapture]:
    with EventCapture(bus) as events:
        yield events


def app_of(scene: Scene, bus: EventBus) -> Starlette:
    async def order(request: Request) -> Response:
        async with scene.begun() as session:
            await put(session, request.query_params["name"])
            bus.publish(Placed(request.query_params["name"]))
        return PlainTextResponse("placed")

    return Starlette(
        routes=[Route("/", order)], middleware=[Middleware(EventContextMiddleware, bus=bus)]
    )


def test_all_is_done_and_no_row_is_left_when_the_client_of_a_running_application_returns(
    bus: EventBus,
    outbox: Outbox,
    scene: Scene,
    seen: list[str],
    events: EventCapture,
    anyio_backend: Backend,
) -> None:
    with client_of(app_of(scene, bus), anyio_backend) as client:
        assert client.get("/?name=ada").status_code == 200
        assert scene.kept() == {}
        assert seen == ["mail ada", "bill ada"]
        assert events.published == [Placed("ada"), Paid("ada")]
        assert events.handled == [Placed("ada"), Paid("ada")]

    assert scene.kept() == {}
    assert scene.table.processes() == set()


def test_all_is_done_and_no_row_is_left_when_a_client_without_a_lifespan_returns(
    bus: EventBus,
    outbox: Outbox,
    scene: Scene,
    seen: list[str],
    events: EventCapture,
    anyio_backend: Backend,
) -> None:
    client = client_of(app_of(scene, bus), anyio_backend)

    assert client.get("/?name=ada").status_code == 200

    assert seen == ["mail ada", "bill ada"]
    assert events.handled == [Placed("ada"), Paid("ada")]
    assert events.requeued == []
    assert scene.kept() == {}


def test_in_memory_handlers_run_although_the_outer_transaction_is_rolled_back(
    bus: EventBus, outbox: Outbox, scene: Scene, seen: list[str], anyio_backend_name: str
) -> None:
    """As a suite does whose fixture rolls back what each test has done."""
    if scene.awaits or anyio_backend_name == "trio":
        pytest.skip("without an event loop")
    with EventCapture(bus) as events, outbox.in_memory(), scene.plain.connect() as connection:
        outer = connection.begin()
        with (
            bus.context(),
            scene.session(bind=connection, join_transaction_mode="create_savepoint") as session,
        ):
            session.connection()
            bus.publish(Placed())
            session.commit()
        outer.rollback()

        assert seen == ["mail ada", "bill ada"]
        assert events.handled == [Placed(), Paid()]
        assert events.requeued == []
    assert scene.kept() == {}


async def write_into_an_outer_transaction(
    scene: Scene, bus: EventBus, end: Callable[[Any], Any]
) -> None:
    async with bus.context(), scene.connection() as connection:
        outer = await done(connection.begin())
        session = scene.session(bind=connection, join_transaction_mode="create_savepoint")
        await put(session)
        bus.publish(Placed())
        await done(session.commit())
        await done(session.close())
        await done(end(outer))


@pytest.mark.anyio
async def test_a_test_fails_that_has_rolled_back_durable_rows_with_an_outer_transaction(
    bus: EventBus, outbox: Outbox, scene: Scene, seen: list[str]
) -> None:
    with pytest.raises(AssertionError, match=r"in_memory\(\)") as caught, EventCapture(bus):
        await write_into_an_outer_transaction(scene, bus, lambda outer: outer.rollback())

    assert "mail x1" in str(caught.value)
    with EventCapture(bus):
        pass  # the next test knows nothing of it


@pytest.mark.anyio
async def test_the_error_of_a_test_goes_before_its_rolled_back_rows(
    bus: EventBus, outbox: Outbox, scene: Scene, seen: list[str]
) -> None:
    def fail(outer: Any) -> None:
        raise LookupError

    with pytest.raises(LookupError), EventCapture(bus):
        await write_into_an_outer_transaction(scene, bus, fail)


@pytest.mark.anyio
async def test_a_test_passes_that_commits_its_outer_transaction(
    bus: EventBus, outbox: Outbox, scene: Scene, seen: list[str]
) -> None:
    with EventCapture(bus) as events:
        await write_into_an_outer_transaction(scene, bus, lambda outer: outer.commit())

        assert events.requeued == [Placed()]
        assert events.requeued.by("mail") == [Placed()]
        assert events.handled == []
        await events.idle()
    assert scene.kept() == {"mail": (State.READY, 0)}


@pytest.mark.anyio
async def test_what_comes_from_the_table_is_handled_as_what_was_published_here(
    bus: EventBus, outbox: Outbox, scene: Scene, seen: list[str]
) -> None:
    with EventCapture(bus) as events:
        await write_into_an_outer_transaction(scene, bus, lambda outer: outer.commit())
        await outbox.run_due()

        assert events.requeued == [Placed()]
        assert events.handled == [Placed(), Paid()]
        await events.idle()
    assert bus.stats.requeued == 0  # counters are as before
    assert scene.kept() == {}


# By the plugin

CONFTEST = """
import pytest
from app import bus

@pytest.fixture
def event_bus():
    return bus
"""
APP = """
from dataclasses import dataclass
from sqlalchemy import create_engine, MetaData, Table, Column, Text, insert
from eventkit import EventBus
from eventkit.outbox import Outbox, add_tables

@dataclass
class Placed:
    name: str

metadata = MetaData()
orders = Table("orders", metadata, Column("name", Text))
add_tables(metadata)
engine = create_engine("sqlite:///shop.db")
metadata.create_all(engine)
bus = EventBus()
outbox = Outbox(bus, engine)
handled = []

@bus.on(Placed, durable=True)
def receipt(event: Placed) -> None:
    handled.append(event)
"""
TESTS = """
import pytest
from sqlalchemy.orm import Session
from app import Placed, bus, engine, handled, insert, orders, outbox

@pytest.fixture
def session():
    with engine.connect() as connection:
        connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        connection.rollback()

def place(session):
    with bus.context():
        session.execute(insert(orders).values(name="ada"))
        bus.publish(Placed("ada"))
        session.commit()

def test_rolled_back(capevents, session):
    place(session)
    assert handled == []

def test_in_memory(capevents, session):
    with outbox.in_memory():
        place(session)
    assert handled == [Placed("ada")]
"""


def test_the_fixture_fails_the_test_at_its_end_and_names_the_remedy(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(app=APP, test_shop=TESTS)
    pytester.makeconftest(CONFTEST)
    plugin = "" if is_installed() else "-p eventkit_pytest"
    pytester.makeini(f"[pytest]\naddopts = {plugin} -p no:cacheprovider -p no:randomly\n")

    result = pytester.runpytest_subprocess("-p", "no:faulthandler")

    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*AssertionError*app:receipt x1*in_memory()*"])
