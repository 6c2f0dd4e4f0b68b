"""A shop in a module of a test's own, with an outbox in a database of its own."""

import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from click.testing import CliRunner, Result
from sqlalchemy import make_url

from eventkit import EventBus
from eventkit._cli import _targets
from eventkit._cli._commands import eventkit
from eventkit._core.bus import all_buses
from tests.outbox.conftest import DRIVERS, opened
from tests.outbox.rows import Database
from tests.serving import PATIENCE, ROOT, eventually

# Before click 8.2 it writes both streams as one, unless it is told not to.
MIXES = "mix_stderr" in inspect.signature(CliRunner).parameters
APART: dict[str, Any] = {"mix_stderr": False} if MIXES else {}
SHOP = """
from contextlib import asynccontextmanager
from dataclasses import dataclass
from threading import Event
from typing import Annotated

from anyio import sleep_forever
from fastapi import Depends, FastAPI
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from eventkit import Durable, EventBus, named
from eventkit.outbox import Outbox
from eventkit.starlette import EventContextMiddleware


@named("shop.placed")
@dataclass(frozen=True)
class Placed:
    number: int = 7


def get_mailer():
    return "a mailer of nobody's"


bus = EventBus(name="shop")
engine = {make}({url!r})
outbox = Outbox(bus, engine, relay=False, schema={schema!r}, lease=1.5)
print("imported", flush=True)


@bus.on(Placed, durable=True, name="mail")
async def mail(event: Placed, mailer: Annotated[str, Depends(get_mailer)]):
    print("mailed", event.number, "by", mailer, flush=True)


@bus.on(Placed, durable=Durable(attempts=1), name="bill")
async def bill(event: Placed):
    raise RuntimeError("no money")


@bus.on(Placed, durable=True, name="block")
def block(event: Placed):
    print("blocked", flush=True)
    Event().wait()


@bus.on(Placed, durable=True, name="wait")
async def wait(event: Placed):
    print("waiting", flush=True)
    await sleep_forever()


@asynccontextmanager
async def lifespan(app):
    app.dependency_overrides[get_mailer] = lambda: "the app's mailer"
    yield
    print("app is down", flush=True)


app = FastAPI(lifespan=lifespan)
app.add_middleware(EventContextMiddleware, bus=bus)
"""


class Running:
    """A command in a process of its own, whose output can be looked at."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait_for(self, text: str) -> None:
        eventually(lambda: text in self.output, lambda: f"no {text!r} in:\n{self.output}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


class Shop:
    """A module with an outbox, and what the command says of it.

    Attributes:
        name: Of the module, in the current directory.
        kept: The outbox's tables.
    """

    def __init__(self, folder: Path, kept: Database) -> None:
        self.folder = folder
        self.kept = kept
        self.name = f"shop_{uuid4().hex[:8]}"
        self.write(SHOP)

    def write(self, source: str, **facts: object) -> None:
        url = self.kept.engine.url
        make = "create_async_engine" if url.get_dialect().is_async else "create_engine"
        facts = {"make": make, "url": url.render_as_string(False), **facts}
        for name, value in {"schema": self.kept.schema, **facts}.items():
            source = source.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", str(value))
        (self.folder / f"{self.name}.py").write_text(source)

    def append(self, source: str) -> None:
        with (self.folder / f"{self.name}.py").open("a") as file:
            file.write(source)

    def __call__(
        self,
        *args: str,
        attr: str = "outbox",
        terminal: str | None = None,
        answer: str | None = None,
    ) -> Result:
        """Run `eventkit outbox` here; `stats` becomes `stats module:outbox`."""
        command, *others = args
        words = ["outbox", command, f"{self.name}:{attr}", *others]
        return self.command(*words, terminal=terminal, answer=answer)

    def relay(self, attr: str, *options: str) -> Result:
        """Run `eventkit relay` here, where it ends by itself."""
        return self.command("relay", f"{self.name}:{attr}", *options)

    def command(self, *args: str, terminal: str | None = None, answer: str | None = None) -> Result:
        sys.modules.pop(self.name, None)
        before = all_buses()  # of other tests
        env = {"TERM": terminal, "COLUMNS": "80", "FORCE_COLOR": "1"} if terminal else {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_targets, "all_buses", lambda: [*except_for(before, all_buses())])
            return CliRunner(env=env, **APART).invoke(
                eventkit, args, input=answer, prog_name="eventkit", catch_exceptions=False
            )

    @contextmanager
    def relaying(self, attr: str, *options: str) -> Generator[Running]:
        """Run `eventkit relay` in a process of its own."""
        words = ["relay", f"{self.name}:{attr}", *options]
        log = self.folder / "output"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "eventkit", *words],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            yield Running(process, log)
        finally:
            process.kill()
            process.wait()


def except_for(before: list[EventBus], buses: list[EventBus]) -> Iterator[EventBus]:
    return (bus for bus in buses if not any(bus is other for other in before))


@pytest.fixture(scope="module", params=["sqlite", "asyncpg"])
def used_kept(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    service_url: Callable[[str], str],
) -> Iterator[Database]:
    yield from kept_in(request.param, tmp_path_factory.mktemp("shop"), service_url)


def kept_in(kind: str, folder: Path, service_url: Callable[[str], str]) -> Iterator[Database]:
    pytest.importorskip({"sqlite": "sqlite3"}.get(kind, kind))
    if kind == "sqlite":
        yield from opened(f"sqlite:///{folder / 'shop.db'}", None)
        return
    url = make_url(service_url("postgres")).set(drivername=DRIVERS[kind])
    yield from opened(url.render_as_string(False), f"eventkit_{uuid4().hex}")


@pytest.fixture
def kept(used_kept: Database) -> Database:
    used_kept.clear()
    return used_kept


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, which the command puts on the path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shop(place: Path, kept: Database) -> Iterator[Shop]:
    """With the tables on each kind of database, empty."""
    shop = Shop(place, kept)
    yield shop
    sys.modules.pop(shop.name, None)


@pytest.fixture
def small_shop(place: Path) -> Iterator[Shop]:
    """On SQLite alone."""
    for kept in opened(f"sqlite:///{place / 'shop.db'}", None):
        yield (shop := Shop(place, kept))
        sys.modules.pop(shop.name, None)
