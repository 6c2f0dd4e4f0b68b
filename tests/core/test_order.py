"""The identity of deliveries, beside the contract of their order."""

import json
import os
import time

import pytest

from eventkit import Delivery, EventBus, NoDeliveryError, current_delivery
from tests.contract.order import Announced
from tests.witness import nothing

pytestmark = pytest.mark.anyio


async def test_current_delivery_outside_a_handler_raises() -> None:
    with pytest.raises(NoDeliveryError, match="pass the id to that code"):
        current_delivery()

    async with EventBus().context():
        with pytest.raises(NoDeliveryError):
            current_delivery()


def test_deliveries_equal_no_other_thing() -> None:
    delivery = Delivery(1, "handler", None, 0, 1, 0, (0, 0))

    assert delivery == Delivery(1, "handler", None, 0, 1, 0, (0, 0))
    assert delivery != Delivery(1, "handler", None, 0, 1, 0, (0, 1))
    assert delivery != 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_repeats_none_of_its_parents_delivery_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 0)  # both publish in the same nanosecond
    bus = EventBus()
    announced = Announced()
    bus.observe(announced)
    bus.subscribe(int, nothing, thread=False)

    def publish() -> list[str]:
        announced.deliveries.clear()
        with bus.context() as unit:
            bus.publish(*range(5))
            unit.discard()
        return [str(delivery.id) for delivery in announced.deliveries]

    before = publish()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, json.dumps(publish()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        forked = json.load(pipe)
    os.waitpid(child, 0)

    assert len({*before, *forked, *publish()}) == 15
