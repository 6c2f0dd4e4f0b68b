"""Owns the outbox's tables: their columns and indexes, their DDL, and whether a database has them.

Knows nothing of statements that read or write rows.
"""

from __future__ import annotations

from enum import IntEnum

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Dialect,
    Double,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
    inspect,
    text,
)
from sqlalchemy.schema import CreateIndex, CreateTable, SchemaItem

__all__ = ["INBOX", "OUTBOX", "PROCESS", "State", "add_tables", "ddl_of", "problem_of"]

OUTBOX = "eventkit_outbox"
PROCESS = "eventkit_process"
INBOX = "eventkit_inbox"

# The same words in every statement: SQLite uses a partial index only if it finds its condition
# in the statement, term by term.
_WAITING = text("state in (0, 3, 4)")
_LEASED = text("state = 1")
_KEYED = text("key is not null")

_REMEDY = "add_tables(Base.metadata), then run your migrations or create_all"


class State(IntEnum):
    """The states of a row.

    | state | means | leaves by |
    |---|---|---|
    | READY | due at `due_at` | claim |
    | LEASED | its `owner` runs it | completion (deleted), failure, give-back, reap |
    | DEAD | attempts used up, or given up | retry, drop |
    | UNREADABLE | cannot be decoded here, tried again when due | claim |
    | SUSPECT | its process died more than once | claim, alone |
    """

    READY = 0
    LEASED = 1
    DEAD = 2
    UNREADABLE = 3
    SUSPECT = 4


def add_tables(metadata: MetaData, *, schema: str | None = None) -> None:
    """Put the outbox's tables into your MetaData.

        add_tables(Base.metadata)  # beside your models

    Alembic's autogenerate then creates them, and does not drop them later; `create_all` makes
    them, too. To call it again for the same MetaData changes nothing. Not thread-safe: call it
    where the models are defined.

    Args:
        metadata: What your migrations or `create_all` work with.
        schema: Where the tables are to be. By default where the MetaData puts its own.
    """
    schema = schema if schema is not None else metadata.schema
    for name, items in _items().items():
        if (name if schema is None else f"{schema}.{name}") not in metadata.tables:
            Table(name, metadata, *items, schema=schema)


def ddl_of(dialect: Dialect, schema: str | None) -> str:
    """The statements that create the tables, each ended by `;`."""
    metadata = MetaData()
    add_tables(metadata, schema=schema)
    statements = list[str]()
    for table in metadata.sorted_tables:
        statements.append(str(CreateTable(table).compile(dialect=dialect)).strip())
        statements += (str(CreateIndex(index).compile(dialect=dialect)) for index in _sorted(table))
    return "".join(f"{statement};\n" for statement in statements)


def problem_of(connection: Connection, schema: str | None) -> str | None:
    """What is missing in the database, and what to do; None if all tables are as they should be."""
    database = inspect(connection)
    metadata = MetaData()
    add_tables(metadata)
    for table in metadata.tables.values():  # the one that gives the outbox its name first
        if not database.has_table(table.name, schema):
            return f"there is no table {table.name}{_place(connection, schema)}: {_REMEDY}"
        there = {column["name"] for column in database.get_columns(table.name, schema)}
        for column in table.columns:
            if column.name not in there:
                return f"{table.name} has no column '{column.name}': {_REMEDY}"
    return None


def _place(connection: Connection, schema: str | None) -> str:
    if schema is not None:
        return f" in schema '{schema}'"
    path = connection.exec_driver_sql("select current_setting('search_path')").scalar_one()
    return f" in the search_path ({path}), or Outbox(schema=...) has to name its schema"


def _sorted(table: Table) -> list[Index]:
    return sorted(table.indexes, key=lambda index: str(index.name))


def _items() -> dict[str, list[SchemaItem]]:
    """Columns and indexes of each table, made anew: they belong to one table each."""
    return {
        OUTBOX: [
            Column("id", Uuid, primary_key=True),
            Column("event_id", Uuid, nullable=False),
            Column("event_type", Text, nullable=False),
            Column("handler", Text, nullable=False),
            Column("key", Text),
            # 0 without a key. An identity, because Alembic does not see sequences; SQLite has none.
            Column("position", BigInteger, Identity(), nullable=False),
            # Text instead of JSON: an exact round trip, and one way for all drivers.
            Column("payload", Text, nullable=False),
            Column("headers", Text),
            Column("depth", Integer, nullable=False),
            # Times are seconds since 1970: one arithmetic on both databases. This is the
            # publisher's clock, all others are the database's.
            Column("published_at", Double, nullable=False),
            Column("state", SmallInteger, nullable=False),
            Column("attempt", Integer, nullable=False),
            Column("due_at", Double, nullable=False),
            Column("owner", Text),
            Column("error", Text),
            _index("due", "due_at", where=_WAITING),
            _index("owner", "owner", where=_LEASED),
            _index("key", "handler", "key", "position", where=_KEYED),
        ],
        PROCESS: [
            Column("owner", Text, primary_key=True),
            Column("alive_until", Double, nullable=False),
        ],
        # Messages that were received from a broker.
        INBOX: [
            Column("consumer", Text, primary_key=True),
            Column("message_id", Text, primary_key=True),
            Column("received_at", Double, nullable=False),
            # A week of messages is kept, and relays look for the oldest of them once per hour.
            Index(f"{INBOX}_received", "received_at"),
        ],
    }


def _index(name: str, *columns: str, where: object) -> Index:
    return Index(f"{OUTBOX}_{name}", *columns, postgresql_where=where, sqlite_where=where)
