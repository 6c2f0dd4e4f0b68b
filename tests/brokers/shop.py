"""Two services that are killed at random: orders commits and forwards, billing consumes and writes.

Each has a SQLite database and an outbox of its own. The program is one of them, by `--role`.
"""

import argparse
import asyncio
import os
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from eventkit import Durable, EventBus, current_delivery
from eventkit.faststream import Bridge
from eventkit.outbox import Outbox, complete_with
from tests.brokers.happenings import Placed
from tests.brokers.kinds import KINDS, import_clients
from tests.brokers.worker import commands, serve
from tests.crash.tables import Business, Effect
from tests.crash.worker import say

# As long as the broker is away, and for all that fails at random.
AGAIN = Durable(attempts=10_000, backoff=lambda attempt, error: 0.2)

import_clients()


class Service:
    """One of the two."""

    def __init__(self, options: argparse.Namespace) -> None:
        kind = KINDS[options.kind]
        self.random = random.Random(options.seed)
        self.committed = 0
        self.rests = False
        # Ten times of SQLite's own limit, on a busy machine.
        self.engine = create_async_engine(
            f"sqlite+aiosqlite:///{options.database}", connect_args={"timeout": 50}
        )
        self.bus = EventBus()
        self.outbox = Outbox(self.bus, self.engine, lease=options.lease)
        self.broker = kind.broker(options.url)
        bridge = Bridge(self.bus, source=f"/{options.role}")
        self.is_publisher = options.role == "orders"
        if self.is_publisher:
            publisher = kind.publisher(self.broker, options.orders)
            bridge.forward(Placed, publisher, timeout=5.0, durable=AGAIN)
        else:
            bridge.consume(
                kind.subscriber(self.broker, options.orders, "billing"),
                Placed,
                dead_letter=kind.dead_letters(self.broker, options.dead),
                durable=True,
            )
            self.bus.subscribe(Placed, self.invoice, durable=AGAIN, name="invoice")

    async def invoice(self, event: Placed) -> None:
        """Write an effect in the transaction that completes the delivery."""
        if self.random.random() < 0.05:
            raise RuntimeError("at random")
        async with AsyncSession(self.engine) as session:
            complete_with(session)
            session.add(
                Effect(
                    handler="invoice",
                    id=str(event.number),
                    pid=os.getpid(),
                    attempt=current_delivery().attempt,
                )
            )
            await session.commit()

    async def place(self) -> None:
        """Commit an order and what tells of it; or neither."""
        number = self.random.getrandbits(53)
        async with self.bus.context(background=True), AsyncSession(self.engine) as session:
            session.add(Business(id=str(number)))
            self.bus.publish(Placed(number))
            await session.flush()
            if self.random.random() < 0.1:
                await session.rollback()
                return
            await session.commit()
        self.committed += 1

    async def work(self) -> None:
        while not self.rests:
            try:
                await self.place()
            except SQLAlchemyError as error:
                say("commit failed", text=str(error)[:300])
            await asyncio.sleep(self.random.random() * 0.1)
        say("rests", committed=self.committed)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncGenerator[None]:
        async with self.broker:
            await self.broker.start()
            working = asyncio.create_task(self.work()) if self.is_publisher else None
            listening = asyncio.create_task(self.listen())
            say("ready", pid=os.getpid())
            yield
            self.rests = True
            listening.cancel()
            if working is not None:
                await working
        await self.engine.dispose()
        say("stopped")

    async def listen(self) -> None:
        async for command in commands():
            assert command["do"] == "rest"
            self.rests = True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--role", choices=["orders", "billing"], required=True)
    parser.add_argument("--kind", choices=[*KINDS], required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--database", required=True)
    parser.add_argument("--orders", required=True, help="the channel of the events")
    parser.add_argument("--dead", required=True, help="the channel of dead letters")
    parser.add_argument("--lease", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    asyncio.run(serve(partial(Service, options)))


if __name__ == "__main__":
    main()
