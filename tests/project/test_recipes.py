"""What the page of recipes promises beside what its own blocks assert."""

import logging
from collections.abc import Generator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import stamina
import structlog
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker
from structlog.testing import LogCapture

from eventkit import EventBus
from tests.databases import Row, sqlite
from tests.project.pages import DOCS, RunPage
from tests.witness import assert_settled, witnessed


@pytest.fixture
def structured() -> Generator[list[MutableMapping[str, Any]]]:
    capture = LogCapture()
    structlog.configure(processors=[capture])
    yield capture.entries
    structlog.reset_defaults()


def test_a_retry_logs_no_payload(
    run_page: RunPage,
    structured: list[MutableMapping[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    run_page(DOCS / "recipes.md")

    retries = [line for line in structured if line["event"] == "stamina.retry_scheduled"]
    assert len(retries) == 2
    assert "StockReserved" not in repr(retries)
    assert "StockReserved" not in caplog.text


@pytest.mark.anyio
async def test_a_session_and_a_unit_of_work_in_each_attempt_let_the_next_one_begin_afresh(
    tmp_path: Path,
) -> None:
    bus = EventBus()
    names = iter(["taken", "free"])

    @bus.on(int, name="register")
    async def register(event: int) -> None:
        async for attempt in stamina.retry_context(on=IntegrityError, attempts=5):
            with attempt:
                async with bus.context():
                    with sessions() as session, session.begin():
                        name = next(names)
                        bus.publish(name)
                        session.add(Row(name=name))
                        session.flush()

    @bus.on(str, name="welcome")
    async def welcome(event: str) -> None: ...

    with sqlite(tmp_path / "test.db") as engine:
        sessions: sessionmaker[Session] = sessionmaker(engine)
        with sessions.begin() as session:
            session.add(Row(name="taken"))
        seen = witnessed(bus)
        with stamina.set_testing(True, attempts=5):
            async with bus.context():
                bus.publish(1)
        with sessions() as session:
            rows = set(session.scalars(select(Row.name)))

    assert rows == {"taken", "free"}
    assert seen == ["discarded taken", "handled 1", "handled free"]
    assert_settled(bus)
