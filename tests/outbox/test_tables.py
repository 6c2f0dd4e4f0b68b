"""The tables: in a MetaData, in Alembic's eyes, in a database that has not all of them."""

from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Column, Connection, Integer, MetaData, Table, Text, create_engine, text
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.schema import CreateSchema, DropSchema

from eventkit.outbox._store import State, Store, add_tables
from tests.outbox.rows import Database, placed

TABLES = {"eventkit_outbox", "eventkit_process", "eventkit_inbox"}


def test_the_tables_are_added_once_beside_others() -> None:
    metadata = MetaData()
    Table("orders", metadata, Column("id", Integer, primary_key=True))

    add_tables(metadata)
    outbox = metadata.tables["eventkit_outbox"]
    add_tables(metadata)

    assert set(metadata.tables) == {"orders", *TABLES}
    assert metadata.tables["eventkit_outbox"] is outbox
    assert len(outbox.indexes) == 3


def test_tables_of_two_schemas_and_of_two_sets_of_models_do_not_meet() -> None:
    metadata, other = MetaData(), MetaData(schema="app")

    for _ in range(2):
        add_tables(metadata)
        add_tables(metadata, schema="events")
        add_tables(other)

    assert set(metadata.tables) == TABLES | {f"events.{name}" for name in TABLES}
    assert set(other.tables) == {f"app.{name}" for name in TABLES}


def test_names_of_constraints_are_left_to_the_users_convention() -> None:
    metadata = MetaData(
        naming_convention={"pk": "pk_%(table_name)s", "ix": "ix_%(column_0_label)s"}
    )

    add_tables(metadata)

    outbox = metadata.tables["eventkit_outbox"]
    assert outbox.primary_key.name == "pk_eventkit_outbox"
    assert {index.name for index in outbox.indexes} == {
        f"eventkit_outbox_{name}" for name in ("due", "owner", "key")
    }
    assert {index.name for index in metadata.tables["eventkit_inbox"].indexes} == {
        "eventkit_inbox_received"
    }


@pytest.mark.parametrize("compares_defaults", [False, True])
def test_alembic_sees_no_difference(database: Database, compares_defaults: bool) -> None:
    pytest.importorskip("alembic")
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    if compares_defaults and database.is_sqlite:
        pytest.skip("Alembic compares an identity with what SQLite has: nothing")
    metadata = MetaData()
    add_tables(metadata, schema=database.schema)

    def is_ours(name: str | None, kind: str, parents: Any) -> bool:
        return kind != "schema" or name == database.schema

    def differences(connection: Connection) -> list[Any]:
        options = {
            "include_schemas": database.schema is not None,
            "include_name": is_ours,
            "compare_server_default": compares_defaults,
        }
        context = MigrationContext.configure(connection, opts=options)
        return list(compare_metadata(context, metadata))

    assert database.call(differences) == []


def test_a_migration_that_alembic_generates_makes_what_works(
    sqlite: Database, postgres: Database
) -> None:
    pytest.importorskip("alembic")
    from alembic.autogenerate import produce_migrations, render_python_code
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    metadata = MetaData()
    schema = f"eventkit_{uuid4().hex}"

    def is_no_table(name: str | None, kind: str, parents: Any) -> bool:
        return kind != "table"

    def migrate(connection: Connection, schema: str | None) -> None:
        context = MigrationContext.configure(connection, opts={"include_name": is_no_table})
        script = produce_migrations(context, metadata)
        assert script.upgrade_ops is not None
        code = render_python_code(script.upgrade_ops)
        assert "eventkit." not in code
        import sqlalchemy

        exec(  # as Alembic does
            f"def upgrade():\n{code}\nupgrade()",
            {"op": Operations(context), "sa": sqlalchemy, "__name__": "migration"},
        )

    for database in (sqlite, postgres):
        place = None if database.is_sqlite else schema
        metadata = MetaData()
        add_tables(metadata, schema=place)
        if place is None:
            database.call(metadata.drop_all)
        else:
            database.call(lambda connection: connection.execute(CreateSchema(schema)))
        database.do(migrate, place)
        store = Store(database.engine.dialect, place)
        assert database.do(store.problem) is None
        database.do(store.insert, [placed("mail", key="a"), placed("mail")], None)
        if place is not None:
            database.call(lambda connection: connection.execute(DropSchema(schema, cascade=True)))


def test_the_ddl_makes_all_that_is_needed(database: Database) -> None:
    schema = None if database.is_sqlite else f"eventkit_{uuid4().hex}"
    store = Store(database.engine.dialect, schema)

    def make_anew(connection: Connection) -> None:
        if schema is None:
            metadata = MetaData()
            add_tables(metadata)
            metadata.drop_all(connection)
        else:
            connection.execute(CreateSchema(schema))
        for statement in store.ddl().split(";\n")[:-1]:
            connection.execute(text(statement))
        assert store.problem(connection) is None
        store.insert(connection, [placed("mail", key="a")], None)
        if schema is not None:
            connection.execute(DropSchema(schema, cascade=True))

    database.call(make_anew)
    assert "WHERE state in (0, 3, 4)" in store.ddl()


def test_a_database_with_all_tables_has_no_problem(database: Database) -> None:
    assert database.do(database.store.problem) is None


def test_a_missing_column_is_named_with_the_remedy(sqlite: Database) -> None:
    sqlite.sql("alter table eventkit_outbox drop column depth")

    assert sqlite.do(sqlite.store.problem) == (
        "eventkit_outbox has no column 'depth': add_tables(Base.metadata), then run your"
        " migrations or create_all"
    )


def test_a_column_that_a_later_version_has_is_no_problem(sqlite: Database) -> None:
    sqlite.sql("alter table eventkit_outbox add column later text")

    assert sqlite.do(sqlite.store.problem) is None


def test_a_missing_table_is_named_with_where_it_was_looked_for(
    sqlite: Database, postgres: Database
) -> None:
    sqlite.sql("drop table eventkit_process")
    assert sqlite.do(sqlite.store.problem) == (
        "there is no table eventkit_process in schema 'main': add_tables(Base.metadata), then run"
        " your migrations or create_all"
    )

    nowhere = Store(postgres.engine.dialect, "nowhere")
    problem = postgres.do(nowhere.problem)
    assert problem is not None
    assert problem.startswith("there is no table eventkit_")
    assert "in schema 'nowhere'" in problem

    engine = create_engine(
        postgres.engine.url.update_query_dict({"options": "-csearch_path=nowhere"})
    )
    with engine.connect() as connection:
        problem = Store(engine.dialect, None).problem(connection)
    engine.dispose()
    assert problem is not None
    assert "in the search_path (nowhere), and Outbox() has no schema=" in problem


def test_tables_that_are_made_later_are_found_later(postgres: Database) -> None:
    schema = f"eventkit_{uuid4().hex}"
    url = postgres.engine.url.update_query_dict({"options": f"-csearch_path={schema}"})
    engine = create_engine(url)
    store = Store(engine.dialect, None)
    metadata = MetaData()
    add_tables(metadata)

    with engine.begin() as connection:
        connection.execute(CreateSchema(schema))
        assert store.problem(connection) is not None
        metadata.create_all(connection)
        assert store.problem(connection) is None
        store.insert(connection, [placed("mail")], None)
        connection.execute(DropSchema(schema, cascade=True))
    engine.dispose()


def test_a_schema_with_an_unusual_name_is_quoted(postgres: Database) -> None:
    schema = f'Even"t.kit {uuid4().hex}'
    metadata = MetaData()
    add_tables(metadata, schema=schema)
    store = Store(postgres.engine.dialect, schema)

    def use(connection: Connection) -> None:
        connection.execute(CreateSchema(schema))
        metadata.create_all(connection)
        assert store.problem(connection) is None
        store.insert(connection, [placed("mail", key="a")], "me")
        store.beat(connection, "me", 1.0)
        connection.execute(DropSchema(schema, cascade=True))

    postgres.call(use)


def test_other_databases_and_old_servers_are_refused() -> None:
    dialect = DefaultDialect()
    dialect.name = "mysql"
    with pytest.raises(ValueError, match="needs PostgreSQL or SQLite, not mysql: use deliver_on_c"):
        Store(dialect, None)

    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        store = Store(engine.dialect, None)
        engine.dialect.server_version_info = (3, 34, 1)
        with pytest.raises(ValueError, match=r"sqlite 3\.35 or later, not 3\.34\.1: use deliver"):
            store.problem(connection)
    engine.dispose()


def test_the_words_of_partial_indexes_name_the_states() -> None:
    metadata = MetaData()
    add_tables(metadata)
    indexes = {str(index.name): index for index in metadata.tables["eventkit_outbox"].indexes}

    where = {name: str(index.dialect_options["sqlite"]["where"]) for name, index in indexes.items()}

    waiting = (State.READY, State.UNREADABLE, State.SUSPECT)
    assert where["eventkit_outbox_due"] == f"state in {tuple(map(int, waiting))}"
    assert where["eventkit_outbox_owner"] == f"state = {State.LEASED:d}"
    assert isinstance(metadata.tables["eventkit_outbox"].c.payload.type, Text)
