"""A shop of its own for each test, with real neighbours and a real file."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from fastapi.testclient import TestClient

from eventkit import EventBus
from examples.demo.neighbours import Mail, MailServer, PaymentProvider, Warehouse
from examples.shop.settings import Settings

if TYPE_CHECKING:  # imported when used: the use cases are tested where SQLAlchemy cannot await, too
    from examples.shop.resources import Resources


_AS_LONG_AS_IT_TAKES = 100_000.0  # seconds

Result = TypeVar("Result")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio alone: aiosqlite knows no other event loop."""
    return "asyncio"


@dataclass(frozen=True, slots=True)
class Shop:
    """A running shop and all that is around it."""

    client: TestClient
    resources: Resources
    bus: EventBus
    mails: MailServer
    warehouse: Warehouse
    payments: PaymentProvider
    database: Path
    committed_at_mail: list[int]

    def ask(self, question: Callable[..., Awaitable[Result]], *arguments: object) -> Result:
        """Ask the outbox, on the shop's event loop."""
        assert self.client.portal is not None
        return self.client.portal.call(question, *arguments)

    def run_due(self) -> None:
        """Try again now what has failed, until it is done or dead.

        The relay may have some of it at hand: the outbox's own `run_due` does not wait for that.
        """
        outbox = self.resources.outbox
        while (stats := self.ask(outbox.stats)).ready or stats.leased:
            self.ask(outbox.run_due, _AS_LONG_AS_IT_TAKES)

    @property
    def kept(self) -> list[str]:
        """The handlers of the deliveries in the outbox."""
        return self.column("SELECT handler FROM eventkit_outbox ORDER BY handler")

    def execute(self, statement: str) -> None:
        """Change the database, as any other process would."""
        with closing(sqlite3.connect(self.database)) as connection:
            connection.execute(statement)

    def column(self, query: str) -> list[Any]:  # whatever the column holds
        """Read one column from the database, as any other process would."""
        return read_column(self.database, query)


def read_column(database: Path, query: str) -> list[Any]:
    """Read what is committed, in a connection of its own."""
    with closing(sqlite3.connect(database)) as connection:
        return [value for (value,) in connection.execute(query)]


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """Give a shop that is open for business."""
    from examples.shop.app import create_app

    database = tmp_path / "shop.db"
    committed_at_mail: list[int] = []

    def look_what_is_committed(_: Mail) -> None:
        committed_at_mail.extend(read_column(database, "SELECT count(*) FROM users"))

    with (
        MailServer(on_mail=look_what_is_committed) as mails,
        Warehouse() as warehouse,
        PaymentProvider() as payments,
    ):
        app = create_app(
            Settings(
                database_url=f"sqlite:///{database}",
                smtp_port=mails.port,
                warehouse_url=f"{warehouse.url}/stock",
                payments_url=f"{payments.url}/charges",
            )
        )
        with TestClient(app) as client:
            resources: Resources = app.state.resources
            yield Shop(
                client,
                resources,
                resources.bus,
                mails,
                warehouse,
                payments,
                database,
                committed_at_mail,
            )


@pytest.fixture
def event_bus(shop: Shop) -> EventBus:
    """Give the bus that `capevents` watches."""
    return shop.bus
