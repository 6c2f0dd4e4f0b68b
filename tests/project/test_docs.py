"""What the README and the docs say is run: their programs, and the tests they name as proof."""

import io
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import UUID

import anyio
import pytest
from anyio import create_memory_object_stream, create_task_group
from sqlalchemy import text
from sqlalchemy.event import listen
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from starlette.testclient import TestClient
from starlette.types import Message, Scope

from eventkit import Durable, InvalidEventTypeError
from eventkit._core.endings import abandon
from eventkit.outbox import StoredDelivery
from eventkit.streams import end_at_shutdown
from eventkit.wire import codec_for
from tests.project.messages import lines_of_log, texts
from tests.project.pages import (
    DOCS,
    FENCED,
    PAGES,
    README,
    RunPage,
    blocks,
    first_block,
    replaced,
    run_project,
)
from tests.serving import PATIENCE, ROOT, ask, on_uvicorn, serving
from tests.witness import entered, unit_of

COMMITS = DOCS / "commits.md"
DURABLE, OPERATIONS = DOCS / "durable.md", DOCS / "durable-operations.md"
# A page is a module of its own; the compiler calls it by its file.
OURS = "|".join(re.escape(page.stem) for page in PAGES)
PROOF = re.compile(r"`((?:tests|eventkit)/\S+\.py)::(\w+)`")

pytestmark = pytest.mark.filterwarnings(rf"error:::(.*/)?({OURS})(\.md)?$")


@pytest.fixture(params=PAGES, ids=[page.name for page in PAGES])
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_every_python_block_of_the_page_runs(page: Path, run_page: RunPage) -> None:
    run_page(page)


def test_the_project_of_the_testing_page_is_tested(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are written down as they stand, and its tests run by pytest."""
    files = blocks(DOCS / "testing.md")
    for name, block in files.items():
        (pytester.path / name).write_text(block)

    tests = sum(block.count("def test_") for block in files.values())
    run_project(pytester, monkeypatch, passed=tests + 1)  # one of them on two event loops


def test_the_readmes_tests_test_the_readmes_program(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, program, tests = FENCED.findall(README.read_text())
    (pytester.path / "hello.py").write_text(program)
    (pytester.path / "test_hello.py").write_text(tests)

    run_project(pytester, monkeypatch, passed=tests.count("def test_"))


def test_every_test_that_the_page_names_as_proof_exists(page: Path) -> None:
    for file, name in PROOF.findall(page.read_text()):
        source = (ROOT / file).read_text()
        assert re.search(rf"^\s*(async )?def {name}\(", source, re.MULTILINE), (
            f"{page.name} names {file}::{name}, which does not exist"
        )


def test_the_rescue_of_the_shutdown_page_writes_to_a_file(
    run_page: RunPage, tmp_path: Path
) -> None:
    module = run_page(DOCS / "shutdown.md")
    context = unit_of(module.bus)
    with entered(context):
        module.bus.publish(module.OrderPlaced(1))
        context.release()
    abandon(context)

    assert (tmp_path / "undelivered.jsonl").read_text() == (
        '["shutdown:send_confirmation", "OrderPlaced(number=1)"]\n'
    )


@pytest.fixture
def shop(run_page: RunPage) -> Iterator[TestClient]:
    """A client of the program of the page about commits, with a database of its own."""
    page = run_page(COMMITS)
    with TestClient(page.app, raise_server_exceptions=False) as client:
        yield client


def test_the_program_of_the_commits_page_speaks_of_committed_orders_alone(
    shop: TestClient, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        shop.post("/orders/7")

    assert sorted(capsys.readouterr().out.splitlines()) == [
        "order 7 is packed",
        "order 7 is placed",
    ]


def test_the_savepoint_of_the_commits_page_takes_its_own_event_along(
    shop: TestClient, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (7, 8):
        assert shop.post(f"/orders/{number}/TEN").status_code == 200

    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if not line.endswith("packed")] == [
        "order 7 is placed",
        "coupon TEN is used",
        "order 8 is placed",
    ]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 knows autocommit=False since 3.12")
def test_the_fixture_of_the_commits_page_tests_the_pages_program(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("greenlet")
    tests = blocks(COMMITS)["test_orders.py"]
    (pytester.path / "orders.py").write_text(first_block(COMMITS))
    again = tests[tests.index("@pytest.mark.anyio") :].replace("def test_", "def test_again_")
    (pytester.path / "test_orders.py").write_text(f"{tests}\n\n{again}")

    run_project(pytester, monkeypatch, passed=2)  # the number is free again


@pytest.fixture
def durable(run_page: RunPage) -> ModuleType:
    """The pages about durable deliveries, run, with a handler that does not take its time."""
    page = run_page(DURABLE, {"sleep(3)": "sleep(0)"})
    for block in FENCED.finditer(OPERATIONS.read_text()):
        exec(compile(block[1], str(OPERATIONS), "exec"), vars(page))
    page.Base.metadata.create_all(page.engine)
    return page


def publish(page: ModuleType, *events: object) -> None:
    """Publish events in a transaction, and wait for their handlers."""
    with page.bus.context(), Session(page.engine) as session, session.begin():
        page.bus.publish(*events)


def kept(page: ModuleType) -> list[StoredDelivery]:
    deliveries: list[StoredDelivery] = anyio.run(page.outbox.deliveries, None)
    return deliveries


def test_a_killed_server_of_the_quick_start_is_followed_by_one_that_sends_the_receipt(
    tmp_path: Path,
) -> None:
    def write(seconds: int) -> None:
        program = replaced(
            first_block(DURABLE),
            {
                "sleep(3)": f"sleep({seconds})",
                "Outbox(bus, engine)\napp": "Outbox(bus, engine, lease=1.5)\napp",
                "sqlite:///shop.db": f"sqlite:///{tmp_path / 'shop.db'}",
            },
        )
        (tmp_path / "shop.py").write_text(program)

    command = on_uvicorn("shop:app", folder=tmp_path)
    write(seconds=600)
    with serving(command) as server:
        with closing(server.connect()) as connection:
            ask(connection, "POST", "/orders/7")
        server.wait_for("writing the receipt of order 7")
        server.signal(signal.SIGKILL)
        server.wait()

    write(seconds=0)
    with serving(command) as server:
        server.wait_for("the receipt of order 7 is sent")


def test_the_handlers_of_the_durable_page_run_behind_the_commit_and_leave_no_row(
    durable: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with TestClient(durable.app, raise_server_exceptions=False) as client:
        for _ in range(2):
            client.post("/orders/7")

    assert capsys.readouterr().out.count("the receipt of order 7 is sent") == 1
    with Session(durable.engine) as session:
        assert [each.order_number for each in session.query(durable.Reservation)] == [7]
    assert kept(durable) == []


def test_an_empty_transaction_of_the_durable_page_keeps_its_event(
    durable: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    durable.bus.subscribe(durable.OrderPlaced, fail, name="shop:fail", durable=Durable())
    TestClient(durable.app).post("/orders/7/receipts")

    assert [each.handler for each in kept(durable)] == ["shop:fail"]
    assert "belongs to no transaction" not in caplog.text


async def fail(event: object) -> None:
    raise ConnectionError("the neighbour is away")


def test_a_handler_for_a_base_class_of_the_durable_page_gets_the_concrete_event(
    durable: ModuleType,
) -> None:
    waits = Durable(key=lambda event: "all")  # from the table, in `run_due`
    got: list[object] = []

    async def note(event: object) -> None:
        got.append(event)

    durable.bus.subscribe(durable.ParcelEvent, note, name="shop:note", durable=waits)
    publish(durable, durable.ParcelSent(7))
    assert [each.event_type for each in kept(durable)] == ["shop.parcel.sent.v1"]
    anyio.run(durable.outbox.run_due)

    assert got == durable.parcels == [durable.ParcelSent(7)]
    with pytest.raises(InvalidEventTypeError):
        durable.bus.subscribe(object, note, name="shop:all", durable=True)


def test_five_attempts_take_about_fifteen_seconds() -> None:
    backoff = Durable(attempts=5).backoff
    assert sum(backoff(attempt, OSError()) or 0 for attempt in range(1, 5)) == 15


def test_the_page_that_asks_whether_the_outbox_is_healthy_hears_of_it(durable: ModuleType) -> None:
    with TestClient(durable.app) as client:
        deadline = time.monotonic() + PATIENCE
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < deadline
    assert TestClient(durable.app).get("/ready").status_code == 503


def test_a_reminder_of_the_durable_page_fires_once(durable: ModuleType) -> None:
    now = datetime.fromisoformat("2026-11-29T12:00")
    with Session(durable.engine) as session, session.begin():
        session.add(durable.Reminder(invoice=1, due_at=now - timedelta(days=1)))
        session.add(durable.Reminder(invoice=2, due_at=now + timedelta(days=1)))
    for _ in range(2):
        durable.remind(now)

    assert [*durable.charged.values()] == [1]
    with Session(durable.engine) as session:
        assert [each.invoice for each in session.query(durable.Reminder)] == [2]


def test_a_message_of_the_durable_page_is_handled_once_and_acknowledged(
    durable: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    acknowledged: list[bool] = []

    async def ack() -> None:
        acknowledged.append(True)

    message = SimpleNamespace(data=b'{"number": 7}', headers={"Nats-Msg-Id": "m-1"}, ack=ack)
    for _ in range(2):
        anyio.run(durable.consume, message)

    assert capsys.readouterr().out.count("the receipt of order 7 is sent") == 1
    assert len(acknowledged) == 2


def test_the_key_of_the_durable_page_keeps_deliveries_in_order(durable: ModuleType) -> None:
    for left in range(5):
        publish(durable, durable.StockChanged("nails", left))
    anyio.run(durable.outbox.run_due)

    assert durable.shown == [0, 1, 2, 3, 4]


def test_the_limiter_of_the_durable_page_limits(durable: ModuleType) -> None:
    publish(durable, *map(durable.LabelWanted, range(5)))

    assert len(durable.at_once) == 5
    assert max(durable.at_once) <= 2


def test_the_durable_page_reads_what_was_stored_under_a_former_name(durable: ModuleType) -> None:
    codec = codec_for(durable.Refunded)
    assert codec.decode('{"amount": 5}', "shop.refunded.v1") == durable.Refunded(5, "EUR")


def test_the_durable_page_forgets_what_is_long_dead_and_nothing_else(durable: ModuleType) -> None:
    durable.bus.subscribe(durable.Refunded, fail, name="shop:pay", durable=Durable(attempts=1))
    publish(durable, durable.Refunded(1, "EUR"), durable.Refunded(2, "EUR"))
    first, second = kept(durable)
    assert {first.state, second.state} == {"dead"}
    with durable.engine.begin() as connection:
        forty_days = "update eventkit_outbox set published_at = published_at - 40 * 86400.0"
        connection.execute(text(f"{forty_days} where id = :id"), {"id": first.id.hex})

    assert anyio.run(durable.watch).dead == 2
    assert anyio.run(durable.drop_old_dead_deliveries) == 1
    assert [each.id for each in kept(durable)] == [second.id]


def test_a_delivery_with_one_attempt_is_not_run_again_after_its_process_has_died(
    durable: ModuleType,
) -> None:
    ran: list[object] = []

    async def note(event: object) -> None:
        ran.append(event)

    once = Durable(attempts=1, key=lambda event: "all")  # so that it waits for `run_due`
    durable.bus.subscribe(durable.Refunded, note, name="shop:note", durable=once)
    publish(durable, durable.Refunded(1, "EUR"))
    with durable.engine.begin() as connection:
        connection.execute(text("update eventkit_outbox set attempt = 1"))
    anyio.run(durable.outbox.run_due)

    assert ran == []
    assert [each.state for each in kept(durable)] == ["dead"]


def test_transactions_on_sqlite_begin_as_the_durable_page_has_it(durable: ModuleType) -> None:
    with durable.patient.begin() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.connection.driver_connection.in_transaction


def test_the_settings_for_sqlite_hold_for_aiosqlite_too(
    durable: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("greenlet")
    pytest.importorskip("aiosqlite")

    async def look() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'async.db'}")
        listen(engine.sync_engine, "connect", durable.set_up)
        listen(engine.sync_engine, "begin", durable.begin)
        async with engine.begin() as connection:
            mode = await connection.exec_driver_sql("PRAGMA journal_mode")
            assert mode.scalar_one() == "wal"
            raw: Any = await connection.get_raw_connection()
            assert raw.driver_connection.in_transaction
        await engine.dispose()

    anyio.run(look)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 knows autocommit=False since 3.12")
def test_the_fixture_of_a_test_that_rolls_back_has_both_lines_of_the_durable_page(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("greenlet")
    both = "with outbox.in_memory(), deliver_on_commit(bus, test_engine):"
    assert f"`{both}`" in DURABLE.read_text()
    program = replaced(
        first_block(COMMITS),
        {
            "deliver_on_commit(bus, engine)": "outbox = Outbox(bus, engine)",
            "from eventkit.sqlalchemy import deliver_on_commit": (
                "from eventkit.outbox import Outbox, add_tables, complete_with"
            ),
        },
    )
    program += """

@bus.on(OrderPlaced, durable=True)
async def book(event: OrderPlaced) -> None:
    from test_orders import test_engine

    async with AsyncSession(test_engine) as session:
        complete_with(session)  # no error, though the engine is another one


add_tables(Base.metadata)
"""
    tests = replaced(
        blocks(COMMITS)["test_orders.py"],
        {
            "with deliver_on_commit(bus, test_engine):": both,
            "import Base, OrderPlaced": "import Base, OrderPlaced, book, outbox",
        },
    )
    tests += "    assert capevents.handled.by(book) == [OrderPlaced(7)]\n"
    (pytester.path / "orders.py").write_text(program)
    (pytester.path / "test_orders.py").write_text(tests)

    run_project(pytester, monkeypatch, passed=1)


def test_the_tests_of_the_durable_page_test_the_pages_program(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = replaced(first_block(DURABLE), {"sleep(3)": "sleep(0)"})
    (pytester.path / "shop.py").write_text(program)
    tests = blocks(DURABLE)["test_shop.py"] + LEAVES_A_ROW
    (pytester.path / "test_shop.py").write_text(tests)

    run_project(pytester, monkeypatch, passed=tests.count("def test_"))


LEAVES_A_ROW = """

def test_a_receipt_fails(capevents: EventCapture) -> None:
    capevents.fail(receipt, ConnectionError("the mail server is down"))
    TestClient(app).post("/orders/11")
    assert len(anyio.run(outbox.deliveries, "ready")) == 1


def test_the_next_test_finds_no_row() -> None:
    assert anyio.run(outbox.deliveries, None) == []
"""


def test_alembic_makes_the_tables_as_the_durable_page_has_it_and_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("alembic")
    from alembic import command
    from alembic.config import Config

    models = blocks(DURABLE)["models.py"]
    (tmp_path / "models.py").write_text(models)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "models", raising=False)
    config = Config(tmp_path / "alembic.ini", stdout=io.StringIO())
    command.init(config, str(tmp_path / "migrations"))
    env = tmp_path / "migrations" / "env.py"
    env.write_text(
        replaced(
            env.read_text(),
            {"target_metadata = None": "from models import Base\ntarget_metadata = Base.metadata"},
        )
    )
    config.set_main_option("sqlalchemy.url", f"sqlite:///{tmp_path / 'shop.db'}")

    command.revision(config, "Durable deliveries", autogenerate=True)
    command.upgrade(config, "head")
    command.check(config)  # which raises, if a next one would change anything

    monkeypatch.delitem(sys.modules, "models", raising=False)
    (tmp_path / "models.py").write_text(models.replace("add_tables(Base.metadata)", ""))
    with pytest.raises(Exception, match=r"remove_table.*eventkit_outbox"):
        command.check(config)


def test_the_lines_that_the_durable_page_has_of_the_log_are_written() -> None:
    lines = lines_of_log(OPERATIONS)

    assert len(lines) > 15
    for line in lines:
        assert any(each.startswith(line) for each in texts("outbox", "_core/state.py")), line


def test_the_commands_of_the_durable_page_are_those_that_there_are() -> None:
    cli = pytest.importorskip("eventkit._cli._commands", reason="there is no command yet")
    import click

    lines = re.findall(r"^eventkit .*$", OPERATIONS.read_text(), re.MULTILINE)
    assert len(lines) >= 7
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        words = [str(UUID(int=1)) if word == "ID" else word for word in words]
        command = cli.eventkit
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        command.make_context(line, words)


class Browser:
    """A browser that has opened the websocket of the page about streams."""

    def __init__(self, page: ModuleType) -> None:
        self.page = page
        self.told: list[Message] = []
        self.left = False
        self._say, self._said = create_memory_object_stream[Message](math.inf)

    async def __call__(self) -> None:
        """Be served, until the endpoint has returned; what it raises is raised."""
        scope: Scope = {"type": "websocket", "path": "/paid", "headers": [], "query_string": b""}
        self.say("connect")
        with self._say, self._said:
            await self.page.app(scope, self._said.receive, self._send)

    def say(self, kind: str, **fields: object) -> None:
        self._say.send_nowait({"type": f"websocket.{kind}", **fields})

    def leave(self) -> None:
        self.left = True
        self.say("disconnect", code=1001)

    @property
    def watched(self) -> bool:
        return bool(self.page.bus.handlers_for(self.page.OrderPaid))

    async def _send(self, message: Message) -> None:
        if self.left:
            raise OSError("the browser has left")
        self.told.append(message)


@pytest.fixture
def browser(run_page: RunPage) -> Browser:
    return Browser(run_page(DOCS / "streams.md"))


@pytest.mark.anyio
async def test_a_browser_that_leaves_while_nothing_is_published_is_subscribed_no_longer(
    browser: Browser,
) -> None:
    subscribed = None
    async with create_task_group() as tasks:
        tasks.start_soon(browser)
        await anyio.wait_all_tasks_blocked()
        assert browser.watched
        browser.say("receive", text="hello")
        browser.say("receive", bytes=b"hello")
        await browser.page.bus.dispatch(browser.page.OrderPaid(1))
        await anyio.wait_all_tasks_blocked()
        assert [message["type"] for message in browser.told] == [
            "websocket.accept",
            "websocket.send",
        ]

        browser.leave()
        await anyio.wait_all_tasks_blocked()
        subscribed = browser.watched
        tasks.cancel_scope.cancel()
    assert not subscribed


@pytest.mark.anyio
async def test_a_browser_that_leaves_as_an_event_comes_leaves_no_traceback(
    browser: Browser,
) -> None:
    async with create_task_group() as tasks:
        tasks.start_soon(browser)
        await anyio.wait_all_tasks_blocked()
        browser.left = True  # of which the application is to hear later
        await browser.page.bus.dispatch(browser.page.OrderPaid(1))
        await anyio.wait_all_tasks_blocked()
        browser.leave()
    assert not browser.watched


@pytest.mark.anyio
async def test_the_end_of_the_stream_closes_the_websocket(
    browser: Browser,
) -> None:
    async with create_task_group() as tasks:
        tasks.start_soon(browser)
        await anyio.wait_all_tasks_blocked()
        with end_at_shutdown(browser.page.bus, signals=()):
            pass
        await anyio.wait_all_tasks_blocked()
        assert browser.told[-1]["type"] == "websocket.close"
        browser.say("receive", text="too late")
        browser.leave()
    assert not browser.watched
