"""A websocket lives for hours: each message is a unit of work, delivered before the answer."""

from fastapi import FastAPI
from fastapi.testclient import TestClient

from eventkit import EventBus
from eventkit.testing import EventCapture
from examples.testing.signup import Said


def test_each_message_is_delivered_while_the_connection_is_open(
    app: FastAPI, event_bus: EventBus, capevents: EventCapture
) -> None:
    heard: list[str] = []

    @event_bus.on(Said, thread=False)
    def listen(event: Said) -> None:
        heard.append(event.text)

    with TestClient(app).websocket_connect("/chat") as websocket:
        for text in ("hello", "anybody?"):
            websocket.send_text(text)
            assert websocket.receive_text() == "heard"
            assert heard[-1] == text

    capevents.in_order(Said("hello"), Said("anybody?"))
