"""A plain function that outlives the deadline of the shutdown: its thread, and its row."""

import signal
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.serving import ask, on_uvicorn, serving

PROGRAM = """
import threading
from dataclasses import dataclass

import anyio
from fastapi import FastAPI
from sqlalchemy import MetaData, create_engine
from sqlalchemy.orm import Session

from eventkit import EventBus, named
from eventkit.outbox import Outbox, add_tables
from eventkit.starlette import EventContextMiddleware


@named("test.said.v1")
@dataclass(frozen=True)
class Said:
    name: str


bus = EventBus()
app = FastAPI()
app.add_middleware(EventContextMiddleware, bus=bus, shutdown_timeout=0.2)


@bus.on(Said, name="blocks", durable={durable})
def block(event: Said) -> None:
    print("block has begun", flush=True)
    threading.Event().wait(600)


@app.post("/memory")
def in_memory() -> None:
    bus.publish(Said("hello"))
"""

DURABLE = """
engine = create_engine("sqlite:///cut.db")
metadata = MetaData()
add_tables(metadata)
metadata.create_all(engine)
outbox = Outbox(bus, engine)


@bus.on(Said, name="sleeps", durable=True)
async def sleep(event: Said) -> None:
    print("sleep has begun", flush=True)
    await anyio.sleep(600)


@app.post("/durable")
def durable() -> None:
    with Session(engine) as session, session.begin():
        bus.publish(Said("hello"))
"""


def ended(folder: Path, source: str, path: str, *begun: str) -> str:
    """The log of a uvicorn that was told to end while handlers ran."""
    (folder / "cut.py").write_text(source)

    with serving(on_uvicorn("cut:app", folder=folder), cwd=folder) as server:
        with closing(server.connect()) as connection:
            ask(connection, "POST", path)
        for name in begun:
            server.wait_for(f"{name} has begun")
        server.signal(signal.SIGTERM)
        assert server.wait() == -signal.SIGTERM  # which uvicorn raises again, at its end
        return server.output


def test_uvicorn_cuts_off_a_thread_that_outlives_the_deadline_of_a_sigterm(tmp_path: Path) -> None:
    log = ended(tmp_path, PROGRAM.format(durable=False), "/memory", "block")

    assert "still_running=blocks x1" in log
    assert "undelivered=0 requeued=0 pending=0 running=1" in log
    assert "deliveries undelivered" not in log


def test_at_the_deadline_a_coroutine_is_given_back_and_a_thread_that_runs_is_not(
    tmp_path: Path,
) -> None:
    source = PROGRAM.format(durable=True) + DURABLE
    log = ended(tmp_path, source, "/durable", "block", "sleep")

    assert "still_running=blocks x1" in log
    with closing(sqlite3.connect(tmp_path / "cut.db")) as connection:
        columns = "select handler, state, attempt from eventkit_outbox order by handler"
        rows = connection.execute(columns).fetchall()
        assert rows == [("blocks", 1, 1), ("sleeps", 0, 0)]  # leased, and ready as if not begun
