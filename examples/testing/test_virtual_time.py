"""Hours that pass at once: trio's `MockClock` jumps ahead as soon as everybody waits."""

from typing import Any

import pytest
from trio.testing import MockClock

from eventkit import EventBus, HandlerTimeoutError
from eventkit.testing import EventCapture
from examples.testing.signup import Mailer, SignedUp

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("app")]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


async def test_a_welcome_may_take_an_hour_if_somebody_waits_for_it(
    event_bus: EventBus, capevents: EventCapture, mailer: Mailer
) -> None:
    capevents.delay(mailer.welcome, 3600)

    await event_bus.dispatch(SignedUp("ada@example.org"))

    assert mailer.sent == ["ada@example.org"]


async def test_behind_a_request_it_may_take_half_a_minute(
    event_bus: EventBus, capevents: EventCapture, mailer: Mailer
) -> None:
    capevents.delay(mailer.welcome, 31)

    async with event_bus.context():
        event_bus.publish(SignedUp("ada@example.org"))

    (failure,) = capevents.failures
    assert isinstance(failure.error, HandlerTimeoutError)
    assert mailer.sent == []
