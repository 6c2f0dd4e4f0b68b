"""In one outer transaction that is rolled back: to the application a commit is a commit.

The usual fixture: each session joins the test's connection, and commits a savepoint of the
transaction that the test rolls back. The database is clean again, and the events were delivered.
The engine that is tied is the one that the tests use.
"""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("greenlet")  # SQLAlchemy 2.1 is installed without it

from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from sqlalchemy import Connection, StaticPool, create_engine, event, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from eventkit import EventBus
from eventkit.sqlalchemy import deliver_on_commit
from eventkit.starlette import EventContextMiddleware
from eventkit.testing import EventCapture
from examples.testing.signup import SignedUp


class Base(DeclarativeBase):
    """The tables of the application."""


class Member(Base):
    """Somebody who has signed up."""

    __tablename__ = "members"

    email: Mapped[str] = mapped_column(primary_key=True)


engine = create_engine("sqlite://", connect_args={"check_same_thread": False}, poolclass=StaticPool)


@event.listens_for(engine, "connect")
def leave_transactions_to_sqlalchemy(connection: Any, _: object) -> None:
    connection.isolation_level = None  # SQLite's driver would commit at savepoints


@event.listens_for(engine, "begin")
def begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


@pytest.fixture(scope="module", autouse=True)
def tables() -> Iterator[None]:
    Base.metadata.create_all(engine)
    yield
    engine.dispose()


@pytest.fixture
def connection() -> Iterator[Connection]:
    with engine.connect() as connection, connection.begin() as outer:
        yield connection
        outer.rollback()


@pytest.fixture
def client(connection: Connection, event_bus: EventBus) -> Iterator[TestClient]:
    sessions = sessionmaker(connection, join_transaction_mode="create_savepoint")
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=event_bus)

    @app.post("/members/{email}", status_code=201)
    def sign_up(email: str) -> None:
        with sessions.begin() as session:
            session.add(Member(email=email))
            event_bus.publish(SignedUp(email))
            if not email.endswith("@example.org"):
                raise HTTPException(403, "this is a closed club")

    with deliver_on_commit(event_bus, engine):  # one engine for all tests, and a bus for each
        yield TestClient(app)


@pytest.mark.parametrize("turn", ["first", "second"])
def test_what_was_committed_is_delivered_and_the_next_test_finds_a_clean_database(
    client: TestClient, connection: Connection, capevents: EventCapture, turn: str
) -> None:
    assert client.post("/members/ada@example.org").status_code == 201

    assert capevents.published == [SignedUp("ada@example.org")]
    assert connection.scalar(select(func.count()).select_from(Member)) == 1


def test_what_was_rolled_back_is_discarded(
    client: TestClient, connection: Connection, capevents: EventCapture
) -> None:
    assert client.post("/members/eve@example.com").status_code == 403

    assert capevents.published == []
    assert capevents.discarded == [SignedUp("eve@example.com")]
    assert connection.scalar(select(func.count()).select_from(Member)) == 0
