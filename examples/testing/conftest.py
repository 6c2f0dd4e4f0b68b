"""What a project defines once: the bus under test, and the application around it."""

import pytest
from fastapi import FastAPI

from eventkit import EventBus
from examples.testing.signup import Mailer, create_app


@pytest.fixture
def event_bus() -> EventBus:
    """The bus that `capevents` watches."""
    return EventBus()


@pytest.fixture
def mailer() -> Mailer:
    return Mailer()


@pytest.fixture
def app(event_bus: EventBus, mailer: Mailer) -> FastAPI:
    return create_app(event_bus, mailer)
