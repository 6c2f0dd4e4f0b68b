"""A keeper that keeps deliveries in memory: what the core asks of an outbox, without SQL."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from eventkit import Delivery, EventBus, Observer
from eventkit._core.bus import state_of
from eventkit._core.queue import Envelope
from eventkit._core.state import Host
from eventkit._core.subscriptions import Declaration


class KeptRows(Observer):
    """What one event has in the table."""

    def __init__(self, keeper: "FakeKeeper", indexes: Sequence[int]) -> None:
        self.written = False
        self.indexes = [*indexes]
        self._keeper = keeper

    @property
    def observer(self) -> Observer:
        return self

    def __contains__(self, index: object) -> bool:
        return self.written and index in self.indexes

    def elsewhere(self) -> Sequence[int]:
        return self.indexes if self.written and not self._keeper.may_run else ()

    @contextmanager
    def delivery(self, delivery: Delivery) -> Generator[None]:
        try:
            yield
        except BaseException as error:
            self._keeper.told.append(f"{type(error).__name__} {delivery.handler}")
            raise
        self._keeper.told.append(f"handled {delivery.handler}")


class FakeKeeper:
    """Keeps the durable deliveries of a bus.

    Attributes:
        told: What it was asked and told, in that order.
        may_run: Whether what is kept may run here.
        outbox: What users have of it.
        works: Called while it writes.
        error: What its service raises at its start.
    """

    def __init__(self, bus: EventBus) -> None:
        self.told: list[str] = []
        self.may_run = True
        self.outbox: Any = None
        self.works: Callable[[], Any] = checkpoint
        self.error: Exception | None = None
        state_of(bus).keeper = self

    def admit(self, declarations: Sequence[Declaration]) -> None:
        self.told += [f"admit {each.declared.name}" for each in declarations]

    def accept(self, envelope: Envelope) -> None:
        envelope.rows = KeptRows(self, envelope.plan.durable)

    async def write(self, envelopes: Sequence[Envelope]) -> None:
        await self.works()
        for envelope in envelopes:
            assert envelope.rows is not None
            envelope.rows.written = True
        self.told.append("write " + " ".join(str(each.event) for each in envelopes))

    async def settle(self) -> None:
        self.told.append("settle")

    def serve(self, host: Host, tasks: TaskGroup, *, concurrency: int) -> "FakeKeeper":
        self.told.append(f"serve {concurrency}")
        return self

    @property
    def patience(self) -> float | None:
        return None

    async def start(self) -> None:
        if self.error is not None:
            raise self.error
        self.told.append("start")

    def stop(self) -> None:
        self.told.append("stop")

    async def leave(self) -> None:
        self.told.append("leave")
