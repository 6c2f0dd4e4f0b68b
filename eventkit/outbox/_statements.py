"""Owns how statements differ between PostgreSQL and SQLite: names, clock, lists, types.

Knows nothing of the purpose of the statements.

A statement is written once, for both databases:

- `{outbox}`, `{process}` and `{inbox}` are the tables.
- `{clock}` is the database's time while the statement runs. It is written into rows.
- `{now}` is the time to compare with. On PostgreSQL it is the start of the transaction.
- `{skip}` leaves out rows that another transaction has locked.
- `in :names` takes a list. The text does not depend on the length of the list, so drivers prepare
  each statement once.

Table names include the schema, which is looked up once. So a later `search_path` or
`schema_translate_map` does not lead to other tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Connection,
    Dialect,
    Double,
    Integer,
    Text,
    TextClause,
    Uuid,
    bindparam,
    text,
)
from sqlalchemy.types import TypeEngine

from eventkit.outbox._tables import INBOX, OUTBOX, PROCESS

__all__ = ["Statements", "to_uuid"]

# The types of values: asyncpg needs the type of each parameter.
_TYPES: dict[str, TypeEngine[Any]] = {
    "after": Uuid(),
    "attempt": Integer(),
    "before": Double(),
    "busy": ARRAY(Text()),
    "consumer": Text(),
    "error": Text(),
    "event_types": ARRAY(Text()),
    "handler": Text(),
    "handlers": ARRAY(Text()),
    "id": Uuid(),
    "ids": ARRAY(Uuid()),
    "limit": Integer(),
    "message_id": Text(),
    "owner": Text(),
    "owners": ARRAY(Text()),
    "seconds": Double(),
    "states": ARRAY(Integer()),
}
_NAME = re.compile(r":(\w+)")
_NOT_IN = re.compile(r"\bnot in :(\w+)")
_IN = re.compile(r"\bin :(\w+)")

_POSTGRESQL = {
    "clock": "cast(extract(epoch from clock_timestamp()) as double precision)",
    "now": "cast(extract(epoch from now()) as double precision)",
    "skip": "for update of r skip locked",
}
_SQLITE_CLOCK = "((julianday('now') - 2440587.5) * 86400.0)"
# No `skip`: a writer of SQLite has locked the whole database.
_SQLITE = {"clock": _SQLITE_CLOCK, "now": _SQLITE_CLOCK, "skip": ""}

_OLDEST = {"postgresql": (12,), "sqlite": (3, 35)}


class Statements:
    """Runs statements on the connections of one database. Thread-safe.

    Args:
        dialect: SQLAlchemy's dialect, for PostgreSQL or SQLite.
        schema: The schema of the tables. None: it is looked up once, on the first connection.

    Raises:
        ValueError: The dialect belongs to another database.
    """

    def __init__(self, dialect: Dialect, schema: str | None) -> None:
        if dialect.name not in _OLDEST:
            raise ValueError(
                f"the outbox needs PostgreSQL or SQLite, not {dialect.name}: use deliver_on_commit"
            )
        self.dialect = dialect
        self.is_sqlite = dialect.name == "sqlite"
        self.schema = schema if schema is not None or not self.is_sqlite else "main"
        # No lock: entries are only added, and two threads make equal values for one text.
        self._texts: dict[str, TextClause] = {}

    def run(
        self, connection: Connection, statement: str, /, **values: object
    ) -> list[tuple[Any, ...]]:
        """Run a statement, and return its rows."""
        rows = connection.execute(*self._prepared(connection, statement, values)).all()
        return cast("list[tuple[Any, ...]]", rows)

    def count(self, connection: Connection, statement: str, /, **values: object) -> int:
        """Run a statement without result rows, and return the number of changed rows.

        Not for statements that begin with WITH: SQLite's driver does not count their rows.
        """
        return connection.execute(*self._prepared(connection, statement, values)).rowcount

    @property
    def words(self) -> dict[str, str]:
        """The values of the names in braces."""
        quote = self.dialect.identifier_preparer.quote
        prefix = "" if self.schema is None else f"{quote(self.schema)}."
        words = _SQLITE if self.is_sqlite else _POSTGRESQL
        tables = {"outbox": OUTBOX, "process": PROCESS, "inbox": INBOX}
        return words | {word: prefix + table for word, table in tables.items()}

    def resolve(self, connection: Connection) -> None:
        """Look up the schema of the tables, if it is not known.

        If the tables are not found, the schema stays unknown, and the next statement fails.
        """
        if self.schema is None:
            self.schema = connection.exec_driver_sql(
                "select n.nspname from pg_catalog.pg_class c"
                " join pg_catalog.pg_namespace n on n.oid = c.relnamespace"
                f" where c.oid = to_regclass('{OUTBOX}')"
            ).scalar()

    def check_version(self) -> None:
        """Refuse a version that is too old. The version is known after the first connection.

        Raises:
            ValueError: The version is older than PostgreSQL 12 or SQLite 3.35.
        """
        version = getattr(self.dialect, "server_version_info", None)
        oldest = _OLDEST[self.dialect.name]
        if version is not None and version < oldest:
            raise ValueError(
                f"the outbox needs {self.dialect.name} {_dotted(oldest)} or later, not"
                f" {_dotted(version)}: use deliver_on_commit"
            )

    def _prepared(
        self, connection: Connection, statement: str, values: Mapping[str, object]
    ) -> tuple[TextClause, dict[str, object]]:
        prepared = self._texts.get(statement)
        if prepared is None:
            prepared = self._prepare(connection, statement)
            if self.schema is not None:
                self._texts[statement] = prepared
        return prepared, {name: self._value(value) for name, value in values.items()}

    def _prepare(self, connection: Connection, statement: str) -> TextClause:
        self.resolve(connection)
        said = statement.format_map(self.words)
        names = sorted(set(_NAME.findall(said)))
        if self.is_sqlite:
            said = _IN.sub(r"in (select value from json_each(:\1))", said)
        else:
            said = _IN.sub(r"= any(:\1)", _NOT_IN.sub(r"<> all(:\1)", said))
        return text(said).bindparams(*(bindparam(name, type_=self._type(name)) for name in names))

    def _type(self, name: str) -> TypeEngine[Any]:
        kind = _TYPES[name]
        return Text() if self.is_sqlite and isinstance(kind, ARRAY) else kind

    def _value(self, value: object) -> object:
        """Return the value to bind. SQLite has no arrays, so it gets a list as JSON."""
        if isinstance(value, str) or not isinstance(value, Collection):
            return value
        items = list(cast(Collection[object], value))
        if self.is_sqlite:
            return json.dumps([each.hex if isinstance(each, UUID) else each for each in items])
        return items


def to_uuid(value: object) -> UUID:
    """Make a UUID of an id from a result row. SQLite returns hexadecimal digits."""
    return value if isinstance(value, UUID) else UUID(str(value))


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
