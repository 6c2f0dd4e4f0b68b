"""Events that are delivered in any case: no transaction decides them, and that is no mistake."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, MetaData, create_engine, text
from sqlalchemy.orm import Session

from eventkit import EventBus
from eventkit.outbox import Outbox, add_tables

pytestmark = pytest.mark.anyio


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    metadata = MetaData()
    add_tables(metadata)
    metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("even_on_failure", [True, False])
async def test_only_who_leaves_it_to_no_transaction_by_mistake_is_warned(
    engine: Engine, caplog: pytest.LogCaptureFixture, even_on_failure: bool
) -> None:
    bus = EventBus()
    kept: list[int] = []

    @bus.on(int, name="count", durable=True)
    async def count(event: int) -> None:
        with engine.connect() as connection:
            kept.append(connection.scalar(text("SELECT count(*) FROM eventkit_outbox")) or 0)

    with Outbox(bus, engine):
        async with bus.context():
            if even_on_failure:
                with Session(engine) as session:
                    session.connection()
                    bus.publish(1, even_on_failure=True)
                    session.rollback()
            else:
                bus.publish(1)

    assert kept == [1]
    warned = [line for line in caplog.messages if "belongs to no transaction" in line]
    assert bool(warned) is not even_on_failure
