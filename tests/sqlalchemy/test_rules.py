"""The rules of docs/commits.md, one by one, on each database and through each driver."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import cycle, permutations
from typing import Any

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from anyio import Event, create_task_group, to_thread, wait_all_tasks_blocked
from sqlalchemy import func, insert, inspect, literal, select, text, update
from sqlalchemy.exc import IntegrityError

from eventkit import EventBus
from eventkit.sqlalchemy import CommitTie
from tests.databases import Row
from tests.sqlalchemy.steps import Database, Warnings, Wrong, blocking, done, inside, run
from tests.witness import assert_settled

pytestmark = pytest.mark.anyio

# Any: sessions of either kind.
Step = Callable[[Any], Awaitable[object]]


def add(session: Any, name: str = "ada") -> None:
    session.add(Row(name=name))


# Published and committed, or not


async def add_publish_flush(session: Any, bus: EventBus) -> None:
    add(session)
    bus.publish("ada")
    await done(session.flush())


async def publish_add_flush(session: Any, bus: EventBus) -> None:
    bus.publish("ada")
    add(session)
    await done(session.flush())


async def add_flush_publish(session: Any, bus: EventBus) -> None:
    add(session)
    await done(session.flush())
    bus.publish("ada")


async def add_publish(session: Any, bus: EventBus) -> None:
    add(session)
    bus.publish("ada")


async def publish_add(session: Any, bus: EventBus) -> None:
    bus.publish("ada")
    add(session)


ORDERS = [add_publish_flush, publish_add_flush, add_flush_publish, add_publish, publish_add]
by_order = pytest.mark.parametrize("order", ORDERS)


@by_order
@pytest.mark.parametrize("success", [True, False])
async def test_what_is_committed_is_delivered_whatever_becomes_of_the_unit(
    order: Any, success: bool, bus: EventBus, database: Database, seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            async with inside(database.session()) as session:
                await order(session, bus)
                await done(session.commit())
                assert seen == []
            if not success:
                raise Wrong

    assert (seen, database.names()) == (["handled ada"], ["ada"])


@by_order
@pytest.mark.parametrize("end", ["rollback", "close", "reset"])
async def test_what_is_rolled_back_or_closed_is_discarded_whatever_becomes_of_the_unit(
    order: Any, end: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), inside(database.session()) as session:
        await order(session, bus)
        await done(getattr(session, end)())
        assert seen == ["discarded ada"]

    assert (seen, database.names()) == (["discarded ada"], [])


@pytest.mark.parametrize("end", ["rollback", "close", "commit"])
async def test_a_failed_flush_discards(
    end: str, bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    async with bus.context(), inside(database.session()) as session:
        add(session)
        await done(session.flush())
        bus.publish("before")
        add(session, "first")
        with pytest.raises(IntegrityError):
            await done(session.flush() if end != "commit" else session.commit())
        assert seen == ["discarded before"]
        bus.publish("behind")
        if end != "commit":
            await done(getattr(session, end)())

    assert (seen, database.names()) == (["discarded before", "discarded behind"], [])
    assert warnings() == []


@pytest.mark.parametrize("end", ["rollback", "close", "commit"])
async def test_what_only_reads_has_no_say(
    end: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), inside(database.session()) as session:
        row = Row(name="ada")
        session.add(row)
        await done(session.commit())
        await done(session.refresh(row))
        bus.publish("ada")
        await done(getattr(session, end)())

    assert seen == ["handled ada"]


async def test_a_commit_of_what_only_read_delivers_what_was_published_in_it(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            bus.publish("before")
            async with database.begun() as session:
                bus.publish("in an empty one")
            async with database.begun() as session:
                await done(session.get(Row, "first"))
                bus.publish("in one that read")
            bus.publish("behind")
            raise Wrong

    assert seen == [
        "discarded before",
        "discarded behind",
        "handled in an empty one",
        "handled in one that read",
    ]


# Who has written


async def set_locally(session: Any) -> None:
    setting = {
        "sqlite": "PRAGMA busy_timeout = 1000",
        "postgresql": "SET LOCAL work_mem = '1MB'",
        "mysql": "SET @seen = 1",
    }
    await done(session.execute(text(setting[blocking(session).get_bind().dialect.name])))


async def read_with(session: Any) -> None:
    rows = select(Row.name).where(Row.note != "; insert into").cte("some")
    await done(session.scalars(select(rows)))


async def read_behind_comments(session: Any) -> None:
    await done(session.execute(text("/* insert; */ -- delete;\n SELECT 1")))


async def count(session: Any) -> None:
    await done(session.scalar(select(func.count()).select_from(Row)))


async def patch_nothing(session: Any) -> None:
    row = await done(session.get(Row, "first"))
    row.note = row.note


async def take_the_connection(session: Any) -> None:
    await done(session.connection())


async def read_on_the_connection(session: Any) -> None:
    connection = await done(session.connection())
    await done(connection.execute(select(Row)))


async def stream(session: Any) -> None:
    def read(session: Any) -> None:
        assert session.scalars(select(Row).execution_options(yield_per=1)).first() is not None

    await run(session, read)


async def read_one(session: Any) -> None:
    assert (await done(session.get_one(Row, "first"))).note == ""


async def merge_what_is_there(session: Any) -> None:
    await done(session.merge(Row(name="first", note="", parent=None)))


async def lock(session: Any) -> None:
    await done(session.scalars(select(Row).with_for_update()))


async def add_and_expunge(session: Any) -> None:
    row = Row(name="ada")
    session.add(row)
    session.expunge(row)
    await done(session.get(Row, "first"))


READING = [
    set_locally,
    read_with,
    read_behind_comments,
    count,
    patch_nothing,
    take_the_connection,
    read_on_the_connection,
    stream,
    read_one,
    merge_what_is_there,
    lock,
]


@pytest.mark.parametrize("success", [True, False])
@pytest.mark.parametrize("read", READING)
async def test_reading_has_no_say_when_it_is_closed(
    read: Step, success: bool, bus: EventBus, database: Database, seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            async with inside(database.session()) as session:
                await read(session)
                bus.publish("ada")
            assert seen == []
            if not success:
                raise Wrong

    assert seen == ["handled ada" if success else "discarded ada"]


async def insert_in_cte(session: Any) -> None:
    if blocking(session).get_bind().dialect.name != "postgresql":
        pytest.skip("only PostgreSQL takes an INSERT in a CTE")
    rows = insert(Row).values(name="ada").returning(Row.name).cte("some")
    await done(session.execute(select(rows)))


async def create_a_table(session: Any) -> None:
    if blocking(session).get_bind().dialect.name == "mysql":
        pytest.skip("MariaDB commits it by itself")
    await done(session.execute(text("CREATE TABLE others (name TEXT)")))


async def insert_in_bulk(session: Any) -> None:
    await run(
        session, lambda blocking: blocking.bulk_insert_mappings(inspect(Row), [{"name": "a"}])
    )


async def save_in_bulk(session: Any) -> None:
    await run(session, lambda blocking: blocking.bulk_save_objects([Row(name="ada")]))


async def update_in_bulk(session: Any) -> None:
    await done(session.execute(update(Row), [{"name": "first", "note": "changed"}]))


async def insert_many(session: Any) -> None:
    await done(session.execute(insert(Row), [{"name": "ada"}, {"name": "bob"}]))


async def insert_returning(session: Any) -> None:
    await done(session.scalars(insert(Row).values(name="ada").returning(Row.name)))


async def insert_from_select(session: Any) -> None:
    rows = select(literal("ada"), Row.note)
    await done(session.execute(insert(Row).from_select(["name", "note"], rows)))


async def write_in_text(session: Any) -> None:
    name = '"rows"' if blocking(session).get_bind().dialect.name != "mysql" else "`rows`"
    if blocking(session).get_bind().dialect.name == "postgresql":
        name = "notes"
        await done(session.execute(text("CREATE TEMP TABLE notes (note text) ON COMMIT DROP")))
    await done(session.execute(text(f"update {name} set note = 'changed'")))


async def write_on_the_connection(session: Any) -> None:
    connection = await done(session.connection())
    await done(connection.execute(insert(Row).values(name="ada")))


async def write_nothing(session: Any) -> None:
    await done(session.execute(update(Row).where(Row.name == "nobody").values(note="changed")))


async def merge(session: Any) -> None:
    await done(session.merge(Row(name="ada")))


async def merge_a_change(session: Any) -> None:
    await done(session.merge(Row(name="first", note="changed")))
    # Only what is known when the event is published counts.


async def change(session: Any) -> None:
    (await done(session.get(Row, "first"))).note = "changed"


async def delete_one(session: Any) -> None:
    await done(session.delete(await done(session.get(Row, "first"))))


async def add_all(session: Any) -> None:
    session.add_all([Row(name="ada"), Row(name="bob")])


async def keep_a_savepoint(session: Any) -> None:
    async with inside(session.begin_nested()):
        await done(session.execute(insert(Row).values(name="ada")))


async def fail_to_write(session: Any) -> None:
    with suppress(IntegrityError):
        async with inside(session.begin_nested()):
            await done(session.execute(insert(Row).values(name="first")))
    with suppress(IntegrityError):
        await done(session.execute(insert(Row).values(name="first")))


WRITING = [
    insert_in_cte,
    create_a_table,
    insert_in_bulk,
    save_in_bulk,
    update_in_bulk,
    insert_many,
    insert_returning,
    insert_from_select,
    write_in_text,
    write_on_the_connection,
    write_nothing,
    merge,
    merge_a_change,
    change,
    delete_one,
    add_all,
    keep_a_savepoint,
    fail_to_write,
]


@pytest.mark.parametrize("write", WRITING)
async def test_writing_discards_when_it_is_closed(
    write: Step,
    bus: EventBus,
    database: Database,
    seen: list[str],
    warnings: Warnings,
) -> None:
    async with bus.context():
        async with inside(database.session()) as session:
            await write(session)
            bus.publish("ada")
        assert seen == ["discarded ada"]

    assert (database.names(), warnings()) == ([], [])


@pytest.mark.parametrize("write", WRITING)
async def test_writing_delivers_when_it_is_committed(
    write: Step, bus: EventBus, database: Database, seen: list[str]
) -> None:
    if write is fail_to_write and database.kind == "postgresql":
        pytest.skip("PostgreSQL answers this COMMIT with ROLLBACK")
    if write is create_a_table:
        pytest.skip("the table would stay")
    with suppress(Wrong):
        async with bus.context():
            async with database.begun() as session:
                await write(session)
                bus.publish("ada")
            raise Wrong

    assert seen == ["handled ada"]


# A reader and a writer


READER = ("reader begins", "reader reads", "reader ends")
WRITER = ("writer begins", "writer writes", "writer ends")
ORDERS_OF_TWO = [
    order
    for order in permutations(READER + WRITER)
    if [each for each in order if each in READER] == [*READER]
    and [each for each in order if each in WRITER] == [*WRITER]
]


@pytest.mark.parametrize("writer_ends", ["close", "rollback", "commit"])
async def test_of_a_reader_and_a_writer_the_writer_decides_in_any_order(
    writer_ends: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    outcome = "handled" if writer_ends == "commit" else "discarded"
    ends = cycle(["close", "rollback", "commit"])
    for order in ORDERS_OF_TWO[:: 1 if database.kind == "sqlite" else 3]:  # to connect takes long
        for publish_at in range(order.index("writer ends") + 1):
            reader_ends = next(ends)
            if reader_ends == "commit" and publish_at <= order.index("writer begins"):
                continue  # the reader alone may be open then, and its commit delivers
            database.clear()
            seen.clear()
            await run_both(bus, database, order, publish_at, writer_ends, reader_ends)
            assert seen == [f"{outcome} ada"], (order, publish_at, reader_ends)


async def run_both(
    bus: EventBus,
    database: Database,
    order: tuple[str, ...],
    publish_at: int,
    writer_ends: str,
    reader_ends: str,
) -> None:
    reader, writer = database.session(), database.session()
    with suppress(Wrong):
        async with bus.context():
            for number, step in enumerate(order):
                if number == publish_at:
                    bus.publish("ada")
                match step:
                    case "reader begins":
                        await done(reader.begin())
                    case "reader reads":
                        await done(reader.execute(select(Row)))
                    case "reader ends":
                        await done(getattr(reader, reader_ends)())
                    case "writer begins":
                        await done(writer.begin())
                    case "writer writes":
                        await done(writer.execute(insert(Row).values(name="ada")))
                    case _:
                        await done(getattr(writer, writer_ends)())
            if writer_ends == "commit":
                raise Wrong
    await done(reader.close())
    await done(writer.close())


@pytest.mark.parametrize("first", ["commit", "rollback"])
async def test_of_two_writers_of_one_task_the_one_used_last_decides(
    first: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    if database.kind == "sqlite":
        pytest.skip("SQLite lets one write at a time")
    second = "rollback" if first == "commit" else "commit"
    async with bus.context():
        one, two = database.session(), database.session()
        await done(one.execute(insert(Row).values(name="one")))
        bus.publish("one")
        await done(two.execute(insert(Row).values(name="two")))
        bus.publish("two")
        await done(one.get(Row, "first"))
        bus.publish("one again")
        await done(getattr(one, first)())
        await done(getattr(two, second)())
        await done(one.close())
        await done(two.close())

    assert sorted(seen) == sorted(
        f"{'handled' if end == 'commit' else 'discarded'} {name}"
        for name, end in (("one", first), ("one again", first), ("two", second))
    )


# Tasks and threads


async def test_the_transaction_of_another_task_only_releases_beside_ones_own(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    for end in ("rollback", "commit"):
        begun, published = Event(), Event()

        async def write(end: str = end, begun: Event = begun, published: Event = published) -> None:
            async with inside(database.session()) as session:
                await done(session.execute(insert(Row).values(name=end)))
                begun.set()
                await published.wait()
                await done(getattr(session, end)())

        with suppress(Wrong):
            async with bus.context():
                async with create_task_group() as tasks:
                    tasks.start_soon(write)
                    await begun.wait()
                    async with inside(database.session()) as reader:
                        await done(reader.get(Row, "first"))
                        bus.publish(end)
                        published.set()
                if end == "commit":
                    raise Wrong

    assert seen == ["handled rollback", "handled commit"]


@pytest.mark.parametrize("end", ["rollback", "commit", "close"])
async def test_where_the_own_task_has_none_the_transactions_of_others_are_its_own(
    end: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    begun, published = Event(), Event()

    async def write() -> None:
        async with inside(database.session()) as session:
            await done(session.execute(insert(Row).values(name="ada")))
            begun.set()
            await published.wait()
            await done(getattr(session, end)())

    async with bus.context(), create_task_group() as tasks:
        tasks.start_soon(write)
        await begun.wait()
        bus.publish("ada")
        published.set()

    assert seen == ["handled ada" if end == "commit" else "discarded ada"]


async def test_a_session_that_a_thread_has_begun_is_ones_own_once_it_is_used(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    session, reader = database.session(), database.session()

    def begin() -> None:
        blocking(session).begin()

    async with bus.context():
        await done(reader.get(Row, "first"))
        await to_thread.run_sync(begin)
        add(session)
        await done(session.flush())
        await done(reader.get(Row, "first"))
        await to_thread.run_sync(bus.publish, "ada")
        await done(session.rollback())
        await done(reader.close())
        await done(session.close())

    assert seen == ["discarded ada"]


# Savepoints


@pytest.mark.parametrize("outer", ["commit", "rollback"])
@pytest.mark.parametrize("inner", ["commit", "rollback", "close"])
@pytest.mark.parametrize("writes", ["with a row", "without"])
async def test_a_savepoint_takes_its_events_along_or_leaves_them_to_what_is_around(
    writes: str, inner: str, outer: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), inside(database.session()) as session:
        add(session, "outer")
        bus.publish("before")
        nested = await done(session.begin_nested())
        if writes == "with a row":
            add(session, "inner")
            await done(session.flush())
        bus.publish("inside")
        if inner == "close":
            await run(session, lambda blocking: blocking.get_nested_transaction().close())
        else:
            await done(getattr(nested, inner)())
        bus.publish("after")
        await done(getattr(session, outer)())

    kept = inner == "commit" or (inner == "close" and writes == "without")
    committed_all = outer == "commit"
    expected = {"before": committed_all, "after": committed_all, "inside": kept and committed_all}
    assert {line.split()[1]: line.startswith("handled") for line in seen} == expected
    committed = ["outer"] if outer == "commit" else []
    if outer == "commit" and inner == "commit" and writes == "with a row":
        committed = ["inner", "outer"]
    assert database.names() == committed


async def test_an_outer_savepoint_that_is_rolled_back_takes_a_kept_one_along(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), database.begun() as session:
        with suppress(Wrong):
            async with inside(session.begin_nested()):
                async with inside(session.begin_nested()):
                    add(session, "inner")
                    bus.publish("inner")
                bus.publish("middle")
                raise Wrong
        add(session, "outer")
        bus.publish("outer")

    assert (seen, database.names()) == (
        ["discarded inner", "discarded middle", "handled outer"],
        ["outer"],
    )


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_savepoints_may_be_ended_out_of_order(
    end: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), database.begun() as session:
        outer = await done(session.begin_nested())
        add(session, "outer")
        bus.publish("outer")
        await done(session.begin_nested())
        add(session, "inner")
        bus.publish("inner")
        await done(getattr(outer, end)())  # with the inner one still open
        bus.publish("behind")
        add(session, "behind")

    delivered = sorted(line.removeprefix("handled ") for line in seen if "handled" in line)
    assert delivered == database.names()


# Afterwards


@pytest.mark.parametrize("success", [True, False])
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
async def test_what_was_published_outside_goes_with_the_next_transaction_that_writes(
    end: str, success: bool, bus: EventBus, database: Database, seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            bus.publish("ada")
            async with inside(database.session()) as reader:
                await done(reader.get(Row, "first"))
            async with inside(database.session()) as session:
                await done(session.execute(insert(Row).values(name="ada")))
                await done(getattr(session, end)())
            if not success:
                raise Wrong

    assert seen == ["handled ada" if end == "commit" else "discarded ada"]


@pytest.mark.parametrize("success", [True, False])
async def test_after_a_commit_a_rollback_leaves_it_to_the_unit(
    success: bool, bus: EventBus, database: Database, seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            async with database.begun() as session:
                add(session)
            bus.publish("late")
            async with inside(database.session()) as other:
                await done(other.execute(insert(Row).values(name="bob")))
                await done(other.rollback())
            if not success:
                raise Wrong

    assert seen == ["handled late" if success else "discarded late"]


async def test_after_a_commit_another_commit_releases(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            async with database.begun() as session:
                add(session)
            bus.publish("late")
            async with database.begun() as session:
                add(session, "bob")
            raise Wrong

    assert seen == ["handled late"]


@pytest.mark.parametrize("success", [True, False])
async def test_the_rollback_of_another_task_leaves_it_to_the_unit(
    success: bool, bus: EventBus, database: Database, seen: list[str]
) -> None:
    published = Event()

    async def roll_back() -> None:
        await published.wait()
        async with inside(database.session()) as session:
            await done(session.execute(insert(Row).values(name="ada")))
            await done(session.rollback())

    with suppress(Wrong):
        async with bus.context():
            async with create_task_group() as tasks:
                tasks.start_soon(roll_back)
                await wait_all_tasks_blocked()
                bus.publish("ada")
                published.set()
            if not success:
                raise Wrong

    assert seen == ["handled ada" if success else "discarded ada"]


async def test_a_task_that_the_publisher_starts_afterwards_counts_as_the_publisher(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    async def roll_back() -> None:
        async with inside(database.session()) as session:
            await done(session.execute(insert(Row).values(name="ada")))
            await done(session.rollback())

    async with bus.context():
        bus.publish("ada")
        async with create_task_group() as tasks:
            tasks.start_soon(roll_back)

    assert seen == ["discarded ada"]


async def test_the_commit_of_another_task_releases(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    async def commit() -> None:
        async with database.begun() as session:
            await done(session.execute(insert(Row).values(name="ada")))

    with suppress(Wrong):
        async with bus.context():
            bus.publish("ada")
            async with create_task_group() as tasks:
                tasks.start_soon(commit)
            raise Wrong

    assert seen == ["handled ada"]


# What goes before all of this


async def test_what_was_decided_by_hand_stays_so(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context() as unit, inside(database.session()) as session:
        await done(session.execute(insert(Row).values(name="ada")))
        bus.publish("released")
        unit.release()
        bus.publish("in any case", even_on_failure=True)
        with suppress(Wrong):
            async with bus.context():
                bus.publish("inner")
                raise Wrong
        await done(session.rollback())

    assert seen == ["discarded inner", "handled released", "handled in any case"]
    assert_settled(bus)


async def test_a_unit_and_a_transaction_that_began_before_it(
    bus: EventBus, database: Database, seen: list[str], tie: CommitTie
) -> None:
    async with inside(database.session()) as session:
        await done(session.execute(insert(Row).values(name="ada")))
        async with bus.context():
            bus.publish("not yet used")
            bus.publish("used")
            await done(session.get(Row, "first"))
            await done(session.rollback())

    assert seen == ["discarded not yet used", "discarded used"]
