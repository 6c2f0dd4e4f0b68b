"""Rows are written in the transaction that decides the event, and are gone when it is handled."""

import pytest

from eventkit import EventBus
from eventkit.outbox import Outbox
from eventkit.outbox._store import State
from tests.outbox.scenes import Placed, Scene
from tests.sqlalchemy.steps import put

pytestmark = pytest.mark.anyio


async def test_smoke(bus: EventBus, outbox: Outbox, scene: Scene) -> None:
    seen: list[object] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        seen.append(event)

    async with bus.context() as unit:
        async with scene.begun() as session:
            await put(session)
            unit.publish(Placed())
        assert scene.kept() == {"mail": (State.LEASED, 1)}
    assert seen == [Placed()]
    assert scene.kept() == {}
