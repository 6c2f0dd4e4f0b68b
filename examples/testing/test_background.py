"""As in production: the answer leaves, and handlers run behind it, in the lifespan's own tasks."""

import threading
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from eventkit import EventBus
from eventkit.testing import EventCapture
from examples.testing.signup import Mailer, SignedUp, create_app


@pytest.fixture
def client(event_bus: EventBus, mailer: Mailer) -> Iterator[TestClient]:
    with TestClient(create_app(event_bus, mailer, background=True)) as client:
        yield client


def test_the_answer_waits_for_no_handler(
    client: TestClient, event_bus: EventBus, capevents: EventCapture
) -> None:
    answered = threading.Event()

    @event_bus.on(SignedUp)
    def wait_for_the_answer(event: SignedUp) -> None:
        assert answered.wait(10)

    assert client.post("/members/ada@example.org").status_code == 201
    answered.set()
    capevents.idle_sync()

    assert len(capevents.handled.by(wait_for_the_answer)) == 1


def test_an_event_is_waited_for_by_what_it_says(
    client: TestClient, capevents: EventCapture
) -> None:
    client.post("/members/ada@example.org")

    event = capevents.wait_for_sync(SignedUp, email="ada@example.org")

    assert event == SignedUp("ada@example.org")
