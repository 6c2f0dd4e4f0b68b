"""Through Starlette's `TestClient`, with `with` and without; what has happened is there to assert.

Without `with` no lifespan runs. Either way a request returns when its events have been delivered.
"""

from fastapi import FastAPI
from fastapi.testclient import TestClient

from eventkit.testing import EventCapture
from examples.testing.signup import Mailer, SignedUp


def test_signing_up_sends_a_welcome(app: FastAPI, capevents: EventCapture, mailer: Mailer) -> None:
    response = TestClient(app).post("/members/ada@example.org")

    assert response.status_code == 201
    assert capevents.published == [SignedUp("ada@example.org")]
    assert mailer.sent == ["ada@example.org"]


def test_signing_up_twice_sends_one_welcome(
    app: FastAPI, capevents: EventCapture, mailer: Mailer
) -> None:
    with TestClient(app) as client:
        client.post("/members/ada@example.org")
        response = client.post("/members/ada@example.org")

        assert response.status_code == 409
        capevents.one(SignedUp, email="ada@example.org")
        assert mailer.sent == ["ada@example.org"]


def test_a_mail_server_that_is_down_does_not_stop_people_from_signing_up(
    app: FastAPI, capevents: EventCapture, mailer: Mailer
) -> None:
    client = TestClient(app)
    capevents.fail(mailer.welcome, OSError("no route to host"), times=1)

    assert client.post("/members/ada@example.org").status_code == 201
    assert client.post("/members/bob@example.org").status_code == 201

    (failure,) = capevents.failures
    assert failure.delivery.event == SignedUp("ada@example.org")
    assert mailer.sent == ["bob@example.org"]


def test_some_events_are_recorded_and_handled_by_nobody(
    app: FastAPI, capevents: EventCapture, mailer: Mailer
) -> None:
    with capevents.record_only(SignedUp):
        TestClient(app).post("/members/ada@example.org")

    capevents.one(SignedUp)
    assert mailer.sent == []
