"""Async tests through `ASGITransport`, on every event loop that AnyIO's pytest plugin runs."""

import pytest
from fastapi import FastAPI

from eventkit.testing import EventCapture
from examples.testing.signup import Mailer, SignedUp

pytestmark = pytest.mark.anyio


async def test_httpx(app: FastAPI, capevents: EventCapture, mailer: Mailer) -> None:
    httpx = pytest.importorskip("httpx")
    transport = httpx.ASGITransport(app)

    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/members/ada@example.org")

    assert response.status_code == 201
    capevents.one(SignedUp, email="ada@example.org")
    assert mailer.sent == ["ada@example.org"]


async def test_httpx2(app: FastAPI, capevents: EventCapture, mailer: Mailer) -> None:
    httpx2 = pytest.importorskip("httpx2")
    transport = httpx2.ASGITransport(app)

    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.post("/members/ada@example.org")
        await client.post("/members/bob@example.org")

    assert [event.email for event in capevents.of(SignedUp)] == [
        "ada@example.org",
        "bob@example.org",
    ]
    assert len(mailer.sent) == 2
