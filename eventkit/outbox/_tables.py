"""Owns the outbox's tables: columns and indexes, DDL, and the check that a database has them.

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

# Statements use the same terms: SQLite uses a partial index only if each term of its condition is
# in the statement.
_WAITING = text("state in (0, 3, 4)")
_LEASED = text("state = 1")
_KEYED = text("key is not null")

_REMEDY = "add_tables(Base.metadata), then run your migrations or create_all"


class State(IntEnum):
    """The states of a row.

    | state | meaning | ended by |
    |---|---|---|
    | READY | due at `due_at` | claim, drop |
    | LEASED | its `owner` runs it | completion (deleted), failure, give-back, reap |
    | DEAD | no attempts left, or `backoff` returned None | retry, drop |
    | UNREADABLE | a process could not decode it; tried again when due | claim, retry, drop |
    | SUSPECT | its process died in the second attempt or later | claim (runs alone), drop |
    """

    READY = 0
    LEASED = 1
    DEAD = 2
    UNREADABLE = 3
    SUSPECT = 4


def add_tables(metadata: MetaData, *, schema: str | None = None) -> None:
    """Add the outbox's tables to a `MetaData`.

        add_tables(Base.metadata)  # beside your models

    Then `create_all` makes the tables. Alembic's autogenerate makes them, too, and does not drop
    them later. A second call for the same MetaData changes nothing. Not thread-safe: call it where
    the models are defined.

    Args:
        metadata: The MetaData of your migrations or of `create_all`.
        schema: The schema of the tables. By default the schema of the MetaData.
    """
    schema = schema if schema is not None else metadata.schema
    for name, items in _items().items():
        if (name if schema is None else f"{schema}.{name}") not in metadata.tables:
            Table(name, metadata, *items, schema=schema)


def ddl_of(dialect: Dialect, schema: str | None) -> str:
    """Return the statements that create the tables. Each ends with `;`."""
    metadata = MetaData()
    add_tables(metadata, schema=schema)
    statements = list[str]()
    for table in metadata.sorted_tables:
        statements.append(str(CreateTable(table).compile(dialect=dialect)).strip())
        statements += (str(CreateIndex(index).compile(dialect=dialect)) for index in _sorted(table))
    return "".join(f"{statement};\n" for statement in statements)


def problem_of(connection: Connection, schema: str | None) -> str | None:
    """Return what is missing in the database, and the remedy; None if nothing is missing."""
    database = inspect(connection)
    metadata = MetaData()
    add_tables(metadata)
    for table in metadata.tables.values():  # the outbox table first
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
    return f" in the search_path ({path}), and Outbox() has no schema="


def _sorted(table: Table) -> list[Index]:
    return sorted(table.indexes, key=lambda index: str(index.name))


def _items() -> dict[str, list[SchemaItem]]:
    """Make new columns and indexes for each table: SQLAlchemy binds each of them to one table."""
    return {
        OUTBOX: [
            Column("id", Uuid, primary_key=True),
            Column("event_id", Uuid, nullable=False),
            Column("event_type", Text, nullable=False),
            Column("handler", Text, nullable=False),
            Column("key", Text),
            # 0 without a key. On PostgreSQL an identity, because Alembic does not see sequences.
            # SQLite has no identities.
            Column("position", BigInteger, Identity(), nullable=False),
            # Text instead of JSON: an exact round trip, and the same for all drivers.
            Column("payload", Text, nullable=False),
            Column("headers", Text),
            Column("depth", Integer, nullable=False),
            # Times are seconds since 1970, so both databases compute with them in the same way.
            # `published_at` is by the publisher's clock, all others are by the database's clock.
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
        # The ids of messages that were received from a broker.
        INBOX: [
            Column("consumer", Text, primary_key=True),
            Column("message_id", Text, primary_key=True),
            Column("received_at", Double, nullable=False),
            # Ids are kept for a week. Relays look for the oldest ones once per hour.
            Index(f"{INBOX}_received", "received_at"),
        ],
    }


def _index(name: str, *columns: str, where: object) -> Index:
    return Index(f"{OUTBOX}_{name}", *columns, postgresql_where=where, sqlite_where=where)
