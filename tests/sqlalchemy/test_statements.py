"""Which statements write: told by their text, and shown by what becomes of an event after them.

A transaction that has written and is closed without a commit has lost its events; one that has
only read has no say, and its unit of work, which ends well, delivers them.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from sqlalchemy import Connection, Engine, create_engine, insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from eventkit import EventBus
from eventkit.sqlalchemy import deliver_on_commit
from tests.databases import Row, postgres, sqlite
from tests.witness import nothing, witnessed

READS = {
    "SELECT": "SELECT name FROM rows",
    "in small letters": "select 1",
    "in mixed letters, with space before": " \n\tSeLeCt 1",
    "followed by no space": "SELECT(1)",
    "followed by a literal": "SELECT'ada'",
    "with a semicolon": "SELECT 1;",
    "with a semicolon and a comment": "SELECT 1; -- UPDATE rows",
    "after a comment to the end of the line": "-- DELETE FROM rows\nSELECT 1",
    "after two comments": "-- one\n  -- two; DROP TABLE rows\nSELECT 1",
    "after a comment": "/* INSERT INTO rows; */ SELECT 1",
    "after a comment of stars": "/***/SELECT 1",
    "after a comment over lines": "/*\n * DELETE FROM rows;\n */\nSELECT 1",
    "with a comment inside": "SELECT /* ; DELETE FROM rows */ 1",
    "with a comment at its end": "SELECT 1 -- ; DELETE FROM rows",
    "with a literal": "SELECT '; DELETE FROM rows'",
    "with a quote in a literal": "SELECT 'it''s; DELETE FROM rows'",
    "with the sign of a comment in a literal": "SELECT '/*', '*/', '--', 1",
    "with a quoted name": 'SELECT 1 AS "; DELETE FROM rows"',
    "with a quote in a quoted name": 'SELECT 1 AS "a""; DELETE FROM rows"',
    "with a quote in a comment": "SELECT 1 -- it's\n, 2",
    "with the name of a function": "SELECT replace('a', 'b', 'c')",
    "with an alias": "SELECT 1 AS inserted, 2 AS update_, 3 AS deleted_at",
    "UNION": "SELECT 1 UNION SELECT 2",
    "VALUES": "VALUES (1), (2)",
    "WITH": "WITH x AS (SELECT 1) SELECT * FROM x",
    "WITH RECURSIVE": (
        "WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x WHERE n < 3)"
        " SELECT n FROM x"
    ),
    "WITH in small letters": "with x as (select 1) select * from x",
    "WITH after a comment": "/* DELETE */ WITH x AS (SELECT 1) SELECT * FROM x",
    "WITH of two": "WITH x AS (SELECT 1), y AS (SELECT * FROM x) SELECT * FROM y",
    "WITH of VALUES": "WITH x(n) AS (VALUES (1)) SELECT n FROM x",
    "WITH and a literal": "WITH x AS (SELECT 'DELETE FROM rows') SELECT * FROM x",
    "WITH and a literal that looks like a part": "WITH x AS (SELECT '(DELETE FROM rows)') SELECT 1",
    "WITH and a comment": "WITH x AS (SELECT 1 /* (UPDATE rows */) SELECT * FROM x",
    "WITH and a quoted name": 'WITH "delete" AS (SELECT 1) SELECT * FROM "delete"',
    "WITH and longer names": (
        "WITH inserted AS (SELECT 1 AS updated, 2 AS delete_it) SELECT updated FROM inserted"
    ),
    "EXPLAIN": "EXPLAIN SELECT 1",
    "EXPLAIN of a DELETE": "EXPLAIN DELETE FROM rows",
    "PRAGMA": "PRAGMA table_info(rows)",
    "SAVEPOINT": "SAVEPOINT mine",
}

WRITES = {
    "INSERT": "INSERT INTO rows (name, note) VALUES ('ada', '')",
    "UPDATE": "UPDATE rows SET note = 'changed'",
    "UPDATE of nothing": "UPDATE rows SET note = 'changed' WHERE 1 = 0",
    "DELETE": "DELETE FROM rows",
    "REPLACE": "REPLACE INTO rows (name, note) VALUES ('ada', '')",
    "in small letters": "delete from rows",
    "in mixed letters, with space before": "\n\t dElEtE FROM rows",
    "after a comment to the end of the line": "-- SELECT\nDELETE FROM rows",
    "after a comment": "/* SELECT 1 */ DELETE FROM rows",
    "after a comment that names a read": "/* SELECT */DELETE FROM rows",
    "after the sign of a comment in a comment": "/* /* */ DELETE FROM rows",
    "after a quote in a comment": "/* it's */ DELETE FROM rows -- it's",
    "with a literal": "UPDATE rows SET note = 'SELECT 1'",
    "RETURNING": "DELETE FROM rows RETURNING name",
    "WITH and INSERT": (
        "WITH x AS (SELECT 'ada' AS name) INSERT INTO rows (name, note) SELECT name, '' FROM x"
    ),
    "WITH and UPDATE": "WITH x AS (SELECT 1) UPDATE rows SET note = 'changed'",
    "WITH and DELETE": "WITH x AS (SELECT 1) DELETE FROM rows",
    "WITH and DELETE in mixed letters": "wItH x As (SELECT 1)dElEtE fRoM rows",
    "WITH, a comment and DELETE": "WITH x AS (SELECT 1) /* SELECT */ DELETE FROM rows",
    "WITH, a literal and DELETE": "WITH x AS (SELECT ')(') DELETE FROM rows",
    "CREATE TABLE": "CREATE TABLE others (n integer)",
    "CREATE TEMPORARY TABLE": "CREATE TEMPORARY TABLE others (n integer)",
    "CREATE TABLE AS": "CREATE TABLE others AS SELECT * FROM rows",
    "CREATE INDEX": "CREATE INDEX by_note ON rows (note)",
    "CREATE VIEW": "CREATE VIEW others AS SELECT * FROM rows",
    "ALTER TABLE": "ALTER TABLE rows ADD COLUMN more integer",
    "DROP TABLE": "DROP TABLE rows",
    "ANALYZE": "ANALYZE",
    "REINDEX": "REINDEX rows",
}

# What PostgreSQL alone understands.
POSTGRES_READS = {
    "TABLE": "TABLE rows",
    "SELECT in parentheses": "(SELECT 1)",
    "UNION in parentheses": "((SELECT 1) UNION (SELECT 2)) ORDER BY 1",
    "a comment in parentheses": "( /* DELETE */ SELECT 1)",
    "WITH in parentheses": "(WITH x AS (SELECT 1) SELECT * FROM x)",
    "VALUES in parentheses": "(VALUES (1))",
    "FOR UPDATE": "SELECT name FROM rows FOR UPDATE",
    "FOR UPDATE inside of WITH": (
        "WITH x AS (SELECT name FROM rows FOR UPDATE SKIP LOCKED) SELECT name FROM x"
    ),
    "FOR UPDATE after WITH": "WITH x AS (SELECT 1) SELECT name FROM rows FOR NO KEY UPDATE",
    "WITH MATERIALIZED": "WITH x AS NOT MATERIALIZED (SELECT 1) SELECT * FROM x",
    "WITH and dollars": "WITH x AS (SELECT $$(DELETE FROM rows)$$) SELECT * FROM x",
    "dollars": "SELECT $$; DELETE FROM rows$$",
    "dollars with a name": "SELECT $a$; $$ DELETE FROM rows; $b$ $a$",
    "dollars and a quote": "SELECT $$it's$$, 1",
    "two statements": "SELECT 1; SELECT 2",
    "two statements, a literal in the first": "SELECT ';'; SELECT 2",
    "a backslash in a literal": r"SELECT '\'",
    "SHOW": "SHOW search_path",
    "SET": "SET statement_timeout = 0",
    "SET LOCAL": "SET LOCAL statement_timeout = '10s'",
    "SET and SELECT": "SET LOCAL statement_timeout = '10s'; SELECT 1",
    "SET CONSTRAINTS": "SET CONSTRAINTS ALL IMMEDIATE",
    "SET TRANSACTION": "SET TRANSACTION READ ONLY",
    "RESET": "RESET statement_timeout",
    "set_config": "SELECT set_config('app.user', 'ada', true)",
    "EXPLAIN ANALYZE": "EXPLAIN (ANALYZE, COSTS OFF) SELECT 1",
    "LOCK": "LOCK TABLE rows IN SHARE MODE",
    "advisory lock": "SELECT pg_advisory_xact_lock(1)",
    "a cursor": "DECLARE found CURSOR FOR SELECT name FROM rows",
    "a cursor, used": (
        "DECLARE found CURSOR FOR SELECT name FROM rows; FETCH ALL FROM found; CLOSE found"
    ),
    "LISTEN": "LISTEN channel",
    "RELEASE": "SAVEPOINT mine; RELEASE SAVEPOINT mine",
    "RELEASE in short": "SAVEPOINT mine; RELEASE mine",
    "ROLLBACK TO": "SAVEPOINT mine; ROLLBACK TO SAVEPOINT mine",
    "BEGIN": "BEGIN",
    "START TRANSACTION": "START TRANSACTION",
}

POSTGRES_WRITES = {
    "WITH of an INSERT": (
        "WITH x AS (INSERT INTO rows (name, note) VALUES ('ada', '') RETURNING name)"
        " SELECT name FROM x"
    ),
    "WITH of an UPDATE": (
        "WITH x AS (UPDATE rows SET note = 'changed' RETURNING name) SELECT name FROM x"
    ),
    "WITH of a DELETE": "WITH x AS (DELETE FROM rows RETURNING name) SELECT name FROM x",
    "WITH of a DELETE at the end of a line": "WITH x AS (\n\tDELETE\nFROM rows) SELECT 1",
    "WITH of a DELETE in small letters": "with x as (delete from rows) select 1",
    "WITH of a comment and a DELETE": "WITH x AS (/* SELECT */DELETE FROM rows) SELECT 1",
    "WITH MATERIALIZED of a DELETE": "WITH x AS MATERIALIZED (DELETE FROM rows) SELECT 1",
    "WITH of a DELETE at last": "WITH x AS (SELECT 1), y AS (DELETE FROM rows) SELECT * FROM x",
    "WITH in parentheses": "(WITH x AS (DELETE FROM rows) SELECT 1)",
    "WITH and MERGE": (
        "WITH x AS (SELECT 'ada' AS name) MERGE INTO rows USING x ON rows.name = x.name"
        " WHEN MATCHED THEN DELETE"
    ),
    "MERGE": (
        "MERGE INTO rows USING (SELECT 'ada' AS name) AS x ON rows.name = x.name"
        " WHEN MATCHED THEN DO NOTHING"
    ),
    "after SELECT": "SELECT 1; DELETE FROM rows",
    "before SELECT": "DELETE FROM rows; SELECT 1",
    "after SELECT and a literal": "SELECT ';'; DELETE FROM rows",
    "after SELECT and dollars": "SELECT $$'$$; DELETE FROM rows; SELECT $$'$$",
    "after a backslash in a literal": r"SELECT '\'; DELETE FROM rows; SELECT '\'",
    "after SET": "SET LOCAL statement_timeout = '10s'; DELETE FROM rows",
    "after SAVEPOINT": "SAVEPOINT mine; DELETE FROM rows; RELEASE mine",
    "TRUNCATE": "TRUNCATE rows",
    "COPY": "COPY rows (name) FROM '/dev/null'",
    "COPY of what is there": "copy rows to '/dev/null'",
    "CALL": "CALL nothing()",
    "DO": "DO $$ BEGIN DELETE FROM rows; END $$",
    "CREATE FUNCTION": (
        "CREATE FUNCTION one() RETURNS integer LANGUAGE sql AS $$ SELECT 1; SELECT 1 $$"
    ),
    "COMMENT": "COMMENT ON TABLE rows IS 'SELECT'",
    "GRANT": "GRANT SELECT ON rows TO PUBLIC",
    "NOTIFY": "NOTIFY channel",
    "EXECUTE": "PREPARE clear AS DELETE FROM rows; EXECUTE clear",
    "CLUSTER": "CLUSTER rows USING rows_pkey",
}

# What these two do not understand, and others do. It was sent all the same, and that counts.
ELSEWHERE_READS = {
    "DESCRIBE": "DESCRIBE rows",
    "SHOW": "SHOW TABLES",
    "LOCK": "LOCK TABLES rows READ",
    "parentheses": "(SELECT 1) UNION (SELECT 2)",
    "SET": "SET NAMES utf8mb4",
}
ELSEWHERE_WRITES = {
    "INSERT IGNORE": "INSERT IGNORE INTO rows (name) VALUES ('ada')",
    "LOAD DATA": "LOAD DATA INFILE 'rows.txt' INTO TABLE rows",
    "EXEC": "EXEC change_rows",
    "UPSERT": "UPSERT INTO rows (name) VALUES ('ada')",
    "a block": "{call change_rows}",
    "RENAME": "RENAME TABLE rows TO others",
    "an unknown word": "frobnicate rows",
}


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with sqlite(tmp_path_factory.mktemp("statements") / "test.db") as engine:
        with Session(engine) as session:
            session.execute(insert(Row).values(name="first"))
            session.commit()
        yield engine


@pytest.fixture(scope="module")
def on_postgres(service_url: Callable[[str], str]) -> Iterator[Engine]:
    """Its own schema is where names are looked up, as text is not translated."""
    with postgres(service_url("postgres")) as engine:
        schema = engine.get_execution_options()["schema_translate_map"][None]
        here = engine.url.update_query_dict({"options": f"-c search_path={schema}"})
        named = create_engine(here, poolclass=NullPool)
        with named.begin() as connection:
            connection.exec_driver_sql("CREATE PROCEDURE nothing() LANGUAGE sql AS 'SELECT 1'")
        yield named


def on_connection(engine: Engine, bus: EventBus, statement: str) -> None:
    with engine.connect() as connection:
        execute(connection, statement)
        bus.publish("ada")


def in_session(engine: Engine, bus: EventBus, statement: str) -> None:
    with Session(engine) as session:
        with suppress(DBAPIError):
            session.execute(
                text(statement.replace(":", r"\:")), execution_options={"no_parameters": True}
            )
        bus.publish("ada")


def on_the_connection_of_a_session(engine: Engine, bus: EventBus, statement: str) -> None:
    with Session(engine) as session:
        execute(session.connection(), statement)
        bus.publish("ada")


def execute(connection: Connection, statement: str) -> None:
    """Send it as it is; several statements go to PostgreSQL only where there is no parameter."""
    with suppress(DBAPIError):
        connection.execution_options(no_parameters=True).exec_driver_sql(statement)


def outcomes(engine: Engine, statement: str) -> list[str]:
    """What becomes of an event that is published after it, on a connection and in sessions."""
    bus = EventBus()
    bus.subscribe(str, nothing, thread=False)
    seen = witnessed(bus)
    with deliver_on_commit(bus, engine):
        for use in (on_connection, in_session, on_the_connection_of_a_session):
            with bus.context():
                use(engine, bus, statement)
    return seen


@pytest.mark.parametrize("statement", READS.values(), ids=READS)
def test_what_reads_leaves_the_event_to_the_unit(on_sqlite: Engine, statement: str) -> None:
    assert outcomes(on_sqlite, statement) == ["handled ada"] * 3


@pytest.mark.parametrize("statement", WRITES.values(), ids=WRITES)
def test_what_writes_takes_the_event_along(on_sqlite: Engine, statement: str) -> None:
    assert outcomes(on_sqlite, statement) == ["discarded ada"] * 3


@pytest.mark.parametrize("statement", POSTGRES_READS.values(), ids=POSTGRES_READS)
def test_what_reads_on_postgres_leaves_the_event_to_the_unit(
    on_postgres: Engine, statement: str
) -> None:
    assert outcomes(on_postgres, statement) == ["handled ada"] * 3


@pytest.mark.parametrize("statement", POSTGRES_WRITES.values(), ids=POSTGRES_WRITES)
def test_what_writes_on_postgres_takes_the_event_along(on_postgres: Engine, statement: str) -> None:
    assert outcomes(on_postgres, statement) == ["discarded ada"] * 3


@pytest.mark.parametrize("statement", ELSEWHERE_READS.values(), ids=ELSEWHERE_READS)
def test_what_reads_elsewhere_leaves_the_event_to_the_unit(
    on_sqlite: Engine, statement: str
) -> None:
    assert outcomes(on_sqlite, statement) == ["handled ada"] * 3


@pytest.mark.parametrize("statement", ELSEWHERE_WRITES.values(), ids=ELSEWHERE_WRITES)
def test_what_writes_elsewhere_takes_the_event_along(on_sqlite: Engine, statement: str) -> None:
    assert outcomes(on_sqlite, statement) == ["discarded ada"] * 3
