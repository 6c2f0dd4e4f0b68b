"""The examples that are one file each: as a client in the process sees them."""

import logging
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from examples import starlette_only


def test_the_starlette_shop_confirms_what_was_placed(caplog: pytest.LogCaptureFixture) -> None:
    with TestClient(starlette_only.app) as client:  # the one that a server is given
        assert client.post("/orders", json={"number": 7}).status_code == 201
        assert client.get("/mails").json() == ["Order 7 is placed"]

        refused = client.post("/orders", json={"number": 0})
        assert (refused.status_code, refused.json()) == (422, {"detail": "orders begin with 1"})
        for wrong in ("", "{}", "[]", '{"number": "x"}'):
            assert client.post("/orders", content=wrong).status_code == 400
        assert client.get("/mails").json() == ["Order 7 is placed"]

    warnings = [each for each in caplog.records if each.name == starlette_only.__name__]
    assert [each.getMessage() for each in warnings] == ["an order was refused: orders begin with 1"]


def test_the_starlette_shop_takes_orders_by_websocket() -> None:
    with (
        TestClient(starlette_only.create_app()) as client,
        client.websocket_connect("/counter") as socket,
    ):
        for text, answer in (("1", "placed"), ("0", "refused"), ("x", "refused"), ("2", "placed")):
            socket.send_text(text)
            assert socket.receive_text() == answer
        assert client.get("/mails").json() == ["Order 1 is placed", "Order 2 is placed"]


def test_the_starlette_shop_answers_other_origins() -> None:
    with TestClient(starlette_only.create_app()) as client:
        answer = client.post("/orders", json={"number": 0}, headers={"origin": "https://a.b"})
    assert answer.headers["access-control-allow-origin"] == "*"


def test_fastapi_is_not_needed_for_the_starlette_shop() -> None:
    source = Path(starlette_only.__file__).read_text()
    assert not re.search(r"^\s*(from|import) (fastapi|eventkit\.fastapi)", source, re.MULTILINE)


@pytest.fixture
def heroes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    pytest.importorskip("sqlmodel", reason="pip install sqlmodel, for its example")
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'heroes.db'}")
    from examples.sqlmodel_app import app

    return app


def test_heroes_of_sqlmodel_are_written_about_once_they_are_committed(
    heroes: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with TestClient(heroes) as client:
        created = client.post("/heroes", json={"name": "Ada"})
        assert (created.status_code, created.json()) == (201, {"name": "Ada", "id": 1})
        assert client.get("/diary").json() == ["Ada has joined"]

        assert client.post("/heroes", json={"name": "Ada"}).status_code == 409
        assert client.post("/heroes", json={"name": ""}).status_code == 422
        assert client.get("/diary").json() == ["Ada has joined"]
        assert client.get("/heroes").json() == [{"name": "Ada", "id": 1}]

    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
