"""Rows are written in the transaction that decides the event, and are gone when it is handled."""

from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import event, insert, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from eventkit import EventBus
from eventkit.outbox import Outbox
from eventkit.outbox._store import State
from eventkit.sqlalchemy import deliver_on_commit
from tests.databases import Row, sqlite
from tests.outbox.scenes import Basket, Paid, Placed, Scene
from tests.sqlalchemy.steps import blocking, done, inside, put

pytestmark = pytest.mark.anyio

LEASED = (State.LEASED, 1)
READY = (State.READY, 0)


def durable(bus: EventBus, *names: str) -> list[str]:
    """Subscribe durable handlers of these names; what they have done, as it grows."""
    seen: list[str] = []

    def subscribe(name: str) -> None:
        @bus.on(Placed, durable=True, name=name)
        async def handle(event: Placed) -> None:
            seen.append(f"{name} {event.name}")

    for name in names:
        subscribe(name)
    return seen


@contextmanager
def sent_by(scene: Scene, engine: Any = None) -> Generator[list[str]]:
    """The statements that change the outbox's table and go through the user's engine."""
    engine = scene.hooks if engine is None else engine
    statements: list[str] = []

    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        if "eventkit_outbox" in statement and not statement.startswith("select"):
            statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield statements
    event.remove(engine, "before_cursor_execute", note)


# In the transaction


async def test_three_handlers_take_one_statement_and_three_rows_until_they_are_done(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen = durable(bus, "mail", "stock", "bill")

    with sent_by(scene) as statements:
        async with bus.context():
            async with scene.begun() as session:
                await put(session)
                bus.publish(Placed())
                assert statements == []
            assert len(statements) == 1
            assert statements[0].lower().startswith("insert")
            assert scene.kept() == {"mail": LEASED, "stock": LEASED, "bill": LEASED}
            assert {owner for _, _, owner in scene.table.rows().values()} == scene.table.processes()

    assert seen == ["mail ada", "stock ada", "bill ada"]
    assert scene.kept() == {}
    assert len(statements) == 1  # the outbox's own connections do the rest


async def test_several_events_of_one_transaction_take_one_statement(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen = durable(bus, "mail", "stock")

    with sent_by(scene) as statements:
        async with bus.context():
            async with scene.begun() as session:
                await put(session)
                bus.publish(Placed("ada"), Placed("bob"))
                bus.publish(Placed("eve"))
            assert len(statements) == 1
            assert len(scene.ids()) == 6

    assert sorted(seen) == sorted(
        f"{h} {n}" for n in ("ada", "bob", "eve") for h in ("mail", "stock")
    )


async def test_a_transaction_without_durable_events_sends_nothing_of_the_outboxs(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    durable(bus, "mail")
    bus.subscribe(Paid, lambda event: None, name="memory", thread=False)

    with sent_by(scene) as statements:
        async with bus.context(), scene.begun() as session:
            await put(session)
            bus.publish(Paid())

    assert statements == []


async def test_a_sibling_in_memory_has_no_row_and_runs_beside_the_durable_ones_in_start_order(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    started: list[str] = []
    all_started = anyio.Event()

    async def start(name: str) -> None:
        started.append(name)
        if len(started) == 3:
            all_started.set()
        await all_started.wait()

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        await start("mail")

    @bus.on(Placed, name="memory")
    async def memory(event: Placed) -> None:
        await start("memory")

    @bus.on(Placed, durable=True, name="stock")
    async def stock(event: Placed) -> None:
        await start("stock")

    async with bus.context():
        async with scene.begun() as session:
            await put(session)
            bus.publish(Placed())
        assert scene.kept() == {"mail": LEASED, "stock": LEASED}

    assert started == ["mail", "memory", "stock"]
    assert scene.kept() == {}


async def roll_back(session: Any, publish: Callable[[str], None]) -> None:
    await put(session, "lost")
    publish("lost")
    await done(session.rollback())


async def fail_in_a_flush(session: Any, publish: Callable[[str], None]) -> None:
    await put(session, "lost")
    publish("lost")
    session.add(Row(name="first"))
    with pytest.raises(IntegrityError):
        await done(session.flush())
    await done(session.rollback())


async def fail_in_the_commit(session: Any, publish: Callable[[str], None]) -> None:
    session.add(Row(name="lost", parent="nobody"))
    publish("lost")
    with pytest.raises(IntegrityError):
        await done(session.commit())
    await done(session.rollback())


async def close_without_a_commit(session: Any, publish: Callable[[str], None]) -> None:
    await put(session, "lost")
    publish("lost")
    await done(session.close())


async def roll_back_a_savepoint(session: Any, publish: Callable[[str], None]) -> None:
    await put(session, "kept")
    publish("kept")
    nested = await done(session.begin_nested())
    await put(session, "lost")
    publish("lost")
    await done(nested.rollback())
    await done(session.commit())


async def keep_a_savepoint(session: Any, publish: Callable[[str], None]) -> None:
    await put(session, "kept")
    publish("kept")
    nested = await done(session.begin_nested())
    await put(session, "kept too")
    publish("kept too")
    await done(nested.commit())
    await done(session.commit())


async def try_again(session: Any, publish: Callable[[str], None]) -> None:
    await fail_in_the_commit(session, publish)
    await put(session, "kept")
    publish("kept")
    await done(session.commit())


@pytest.mark.parametrize(
    "steps",
    [
        roll_back,
        fail_in_a_flush,
        fail_in_the_commit,
        close_without_a_commit,
        roll_back_a_savepoint,
        keep_a_savepoint,
        try_again,
    ],
    ids=lambda steps: steps.__name__,
)
async def test_rows_are_there_for_committed_rows_of_business(
    bus: EventBus,
    outbox: Outbox,
    scene: Scene,
    steps: Callable[[Any, Callable[[str], None]], Awaitable[None]],
) -> None:
    seen = durable(bus, "mail")

    async with bus.context():
        session = scene.session()
        await steps(session, lambda name: bus.publish(Placed(name)))
        stored = sorted(scene.payloads())
        await done(session.close())

    names = scene.names()
    assert stored == sorted(f'{{"name":"{name}"}}' for name in names)
    assert sorted(seen) == [f"mail {name}" for name in names]
    assert scene.kept() == {}


async def test_an_event_is_stored_as_it_was_at_its_publish(bus: EventBus, scene: Scene) -> None:
    scene.outbox(bus, relay=False)
    other = EventBus(name="other")
    seen: list[list[str]] = []
    for each in (bus, other):

        @each.on(Basket, durable=True, name="pack")
        async def pack(event: Basket) -> None:
            seen.append(event.names)

    async with bus.context(), scene.begun() as session:
        await put(session)
        bus.publish(basket := Basket(["ada"]))
        basket.names.append("changed")
    assert seen == []
    assert bus.stats.requeued == 1

    report = await scene.outbox(other).run_due()

    assert report.handled == 1
    assert seen == [["ada"]]


# Ways to write and to commit


async def bulk_insert(scene: Scene, publish: Callable[[], None]) -> None:
    async with scene.begun() as session:
        await done(session.execute(insert(Row), [{"name": "ada"}, {"name": "bob"}]))
        publish()


async def bulk_update(scene: Scene, publish: Callable[[], None]) -> None:
    async with scene.begun() as session:
        await done(session.execute(update(Row).values(note="changed")))
        publish()


async def core_begin(scene: Scene, publish: Callable[[], None]) -> None:
    async with inside(scene.engine.begin()) as connection:
        await put(connection)
        publish()


async def core_commit(scene: Scene, publish: Callable[[], None]) -> None:
    async with scene.connection() as connection:
        await put(connection)
        publish()
        await done(connection.commit())


async def in_a_flush(scene: Scene, publish: Callable[[], None]) -> None:
    async with scene.begun() as session:
        event.listen(blocking(session), "after_flush", lambda *_: publish())
        session.add(Row(name="ada"))


async def before_the_commit(scene: Scene, publish: Callable[[], None]) -> None:
    async with scene.begun() as session:
        event.listen(blocking(session), "before_commit", lambda *_: publish())
        session.add(Row(name="ada"))


async def nothing_but_begun(scene: Scene, publish: Callable[[], None]) -> None:
    async with scene.begun():
        publish()


async def added_objects(scene: Scene, publish: Callable[[], None]) -> None:
    async with scene.begun() as session:
        session.add(Row(name="ada"))
        publish()


async def before_the_transaction(scene: Scene, publish: Callable[[], None]) -> None:
    publish()
    async with scene.begun() as session:
        await put(session)


WAYS = [
    bulk_insert,
    bulk_update,
    core_begin,
    core_commit,
    in_a_flush,
    before_the_commit,
    nothing_but_begun,
    added_objects,
    before_the_transaction,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_a_row_is_written_by_the_commit(
    bus: EventBus,
    outbox: Outbox,
    scene: Scene,
    way: Callable[[Scene, Callable[[], None]], Awaitable[None]],
) -> None:
    seen = durable(bus, "mail")

    with sent_by(scene) as statements:
        async with bus.context():
            await way(scene, lambda: bus.publish(Placed()))
            assert scene.kept() == {"mail": LEASED}
            assert len(statements) == 1

    assert seen == ["mail ada"]
    assert scene.kept() == {}


async def test_what_is_published_after_the_commit_is_written_as_the_unit_is_drained(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    kept: list[object] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        kept.append(scene.kept())

    async with bus.context():
        async with scene.begun() as session:
            event.listen(blocking(session), "after_commit", lambda *_: bus.publish(Placed()))
            session.add(Row(name="ada"))
        assert scene.kept() == {}

    assert kept == [{"mail": LEASED}]
    assert scene.kept() == {}


async def test_a_commit_without_a_unit_of_work_sends_nothing(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    durable(bus, "mail")

    with sent_by(scene) as statements:
        async with scene.begun() as session:
            await put(session)

    assert statements == []
    assert scene.names() == ["ada"]


async def test_a_transaction_of_another_task_writes_no_rows_of_this_one(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    """A second session in the unit that is committed first."""
    seen = durable(bus, "mail")

    async with bus.context():
        async with scene.begun() as session:
            await put(session, "ada")
            bus.publish(Placed("ada"))
        assert len(scene.ids()) == 1
        with suppress(LookupError):
            async with scene.begun() as session:
                await put(session, "bob")
                bus.publish(Placed("bob"))
                raise LookupError
        assert len(scene.ids()) == 1

    assert seen == ["mail ada"]
    assert scene.names() == ["ada"]


# Sessions on a connection of their caller


async def on_a_connection(
    scene: Scene, bus: EventBus, mode: str, *, commit: bool
) -> dict[str, tuple[State, int]]:
    """Publish in a session on a connection whose owner decides; what is kept when it is over."""
    async with scene.connection() as connection:
        outer = await done(connection.begin())
        session = scene.session(bind=connection, join_transaction_mode=mode)
        await put(session)
        bus.publish(Placed())
        await done(session.commit())
        await done(session.close())
        await done(outer.commit() if commit else outer.rollback())
    return scene.kept()


async def test_rows_of_a_session_in_a_savepoint_of_its_caller_are_for_a_relay(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen = durable(bus, "mail")

    async with bus.context():
        kept = await on_a_connection(scene, bus, "create_savepoint", commit=True)
        assert kept == {"mail": READY}

    assert seen == []
    assert bus.stats.requeued == 1
    assert (await outbox.run_due()).handled == 1
    assert seen == ["mail ada"]


async def test_rows_of_a_session_in_a_savepoint_go_with_the_transaction_of_its_caller(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen = durable(bus, "mail")

    async with bus.context():
        assert await on_a_connection(scene, bus, "create_savepoint", commit=False) == {}

    assert seen == []
    assert bus.stats.requeued == 1
    assert (await outbox.run_due()).handled == 0
    assert scene.names() == []


@pytest.mark.parametrize("commit", [True, False])
async def test_the_owner_of_a_connection_decides_about_a_session_that_joins_its_transaction(
    bus: EventBus, outbox: Outbox, scene: Scene, commit: bool
) -> None:
    seen = durable(bus, "mail")

    async with bus.context():
        kept = await on_a_connection(scene, bus, "rollback_only", commit=commit)
        assert kept == ({"mail": LEASED} if commit else {})

    assert seen == (["mail ada"] if commit else [])
    assert scene.names() == (["ada"] if commit else [])
    assert scene.kept() == {}


async def test_a_session_that_controls_the_transaction_of_its_caller_commits_its_rows(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen = durable(bus, "mail")

    async with bus.context():
        async with scene.connection() as connection:
            await done(connection.begin())
            session = scene.session(bind=connection, join_transaction_mode="control_fully")
            await put(session)
            bus.publish(Placed())
            await done(session.commit())
            await done(session.close())
        assert scene.kept() == {"mail": LEASED}

    assert seen == ["mail ada"]


# Kinds of transactions


def on_postgres(scene: Scene) -> None:
    if scene.kind != "postgresql":
        pytest.skip("about PostgreSQL")


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_rows_are_written_in_transactions_of_each_isolation_level(
    bus: EventBus, scene: Scene, level: str
) -> None:
    if scene.kind == "sqlite" and level != "SERIALIZABLE":
        pytest.skip("SQLite has one level")
    engine = scene.engine.execution_options(isolation_level=level)
    outbox = scene.outbox(bus, engine=engine)
    seen = durable(bus, "mail", "stock")

    async with bus.context():
        async with inside(scene.sessions(bind=engine).begin()) as session:
            await put(session)
            bus.publish(Placed())
        assert scene.kept() == {"mail": LEASED, "stock": LEASED}

    assert seen == ["mail ada", "stock ada"]
    assert scene.kept() == {}
    assert (await outbox.run_due()).handled == 0


async def test_a_transaction_that_cannot_be_serialized_leaves_no_rows(
    bus: EventBus, scene: Scene
) -> None:
    on_postgres(scene)
    engine = scene.engine.execution_options(isolation_level="REPEATABLE READ")
    scene.outbox(bus, engine=engine)
    seen = durable(bus, "mail")

    async with bus.context():
        session = scene.session(bind=engine)
        await done(session.execute(update(Row).values(note="read")))
        await done(session.rollback())
        await done(session.connection())
        await done(session.get(Row, "first"))
        async with scene.begun() as other:
            await done(other.execute(update(Row).values(note="theirs")))
        bus.publish(Placed("lost"))
        with pytest.raises(DBAPIError):
            await done(session.execute(update(Row).values(note="mine")))
        await done(session.rollback())
        await done(session.execute(update(Row).values(note="again")))
        bus.publish(Placed("kept"))
        await done(session.commit())
        await done(session.close())

    assert seen == ["mail kept"]


async def test_a_prepared_transaction_has_its_rows_before_its_second_phase(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    on_postgres(scene)
    if scene.driver != "psycopg":
        pytest.skip("asyncpg has no two phases in SQLAlchemy")
    async with scene.connection() as connection:
        setting = await done(connection.exec_driver_sql("SHOW max_prepared_transactions"))
        if setting.scalar_one() == "0":
            pytest.skip("the server allows no prepared transactions")
    seen = durable(bus, "mail")

    async with bus.context():
        session = scene.session(twophase=True)
        await put(session)
        bus.publish(Placed("kept"))
        session.prepare()
        assert scene.kept() == {}  # not visible yet
        session.commit()
        assert scene.kept() == {"mail": LEASED}
        await put(session, "bob")
        bus.publish(Placed("lost"))
        session.prepare()
        session.rollback()
        session.close()

    assert seen == ["mail kept"]
    assert scene.names() == ["ada"]


# Several buses, several engines


async def test_two_buses_with_one_engine_have_rows_of_their_own(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    other = EventBus(name="other")
    scene.outbox(other)
    seen = durable(bus, "mail")
    seen_there = durable(other, "other mail")

    async with bus.context(), other.context():
        async with scene.begun() as session:
            await put(session)
            bus.publish(Placed("here"))
            other.publish(Placed("there"))
        assert scene.kept() == {"mail": LEASED, "other mail": LEASED}
        assert len(scene.table.processes()) == 2

    assert seen == ["mail here"]
    assert seen_there == ["other mail there"]
    assert scene.kept() == {}


async def test_the_transaction_of_an_engine_that_is_not_tied_writes_no_rows(
    bus: EventBus, outbox: Outbox, scene: Scene, tmp_path: Path
) -> None:
    """They are written as the unit is drained."""
    seen: list[object] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        seen.append(scene.kept())

    with sqlite(tmp_path / "other.db") as other, sent_by(scene, other) as statements:
        async with bus.context():
            with Session(other) as session:
                await put(session)
                bus.publish(Placed())
                session.commit()
            assert scene.kept() == {}

    assert statements == []
    assert seen == [{"mail": LEASED}]
    assert scene.kept() == {}


async def test_an_event_goes_with_the_engine_in_whose_transaction_it_was_published(
    bus: EventBus, outbox: Outbox, scene: Scene, tmp_path: Path
) -> None:
    """Another engine that is tied to the bus, too."""
    seen = durable(bus, "mail")

    with sqlite(tmp_path / "other.db") as other, deliver_on_commit(bus, other):
        async with bus.context():
            with Session(other) as session:
                await put(session)
                bus.publish(Placed("there"))
                session.commit()
                await put(session, "bob")
                bus.publish(Placed("lost"))
            async with scene.begun() as own:
                await put(own)
                bus.publish(Placed("here"))
            assert scene.payloads() == ['{"name":"here"}']

    assert seen == ["mail there", "mail here"]
    assert scene.kept() == {}
