"""The pages for those who come from elsewhere: both programs run, and what changes is compared."""

import re
import smtplib
import sqlite3
import sys
from collections.abc import Iterator
from email.message import EmailMessage
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Self

import httpx
import pytest
from starlette.testclient import TestClient

from tests.project.test_docs import A_FILE, FENCED, ROOT, run_project

TASKS = ROOT / "docs" / "from-background-tasks.md"


def files(page: Path) -> dict[str, str]:
    """The parts of a page that belong to files of a project, by their first line."""
    parts = [block[1] for block in FENCED.finditer(page.read_text()) if A_FILE.match(block[1])]
    return {part.partition("\n")[0].removeprefix("# "): part for part in parts}


def joined(parts: dict[str, str], name: str) -> str:
    """A file of a project, of all its parts but those that are said to be for durable handlers."""
    of_it = re.compile(rf"{re.escape(name)}(?!.*, durable$)(, .*)?$")
    return "\n\n".join(part for title, part in parts.items() if of_it.match(title))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the files of a page, whose modules are forgotten afterwards."""
    before = {*sys.modules}
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # pyright: ignore[reportUnknownMemberType]
    yield tmp_path
    for name in {*sys.modules} - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


def load(project: Path, name: str, source: str) -> ModuleType:
    path = project / f"{name}.py"
    path.write_text(source)
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class World:
    """What the invoices' application talks to, and its database."""

    def __init__(self) -> None:
        self.mails: list[str] = []
        self.hooks: list[httpx.Request] = []
        self.mail_is_down = False
        self.hook_fails = 0

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.hooks.append(request)
        return httpx.Response(500 if len(self.hooks) <= self.hook_fails else 200)

    def rows(self, table: str) -> list[tuple[object, ...]]:
        connection = sqlite3.connect("shop.db")
        try:
            return connection.execute(f"select * from {table}").fetchall()
        finally:
            connection.close()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()

    class Server:
        def __init__(self, host: str, port: int, timeout: float) -> None:
            if world.mail_is_down:
                raise ConnectionRefusedError("the mail server is away")

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *exc_info: object) -> None: ...

        def send_message(self, message: EmailMessage) -> None:
            world.mails.append(f"{message['To']}: {message['Subject']}")

    monkeypatch.setattr(smtplib, "SMTP", Server)
    return world


def invoiced(module: ModuleType, world: World, **headers: str) -> int:
    """Have an invoice written; the status of the answer."""
    with TestClient(module.app, headers=headers, raise_server_exceptions=False) as client:
        module.app.state.client = world.client()
        answer = client.post("/invoices?email=bob@example.com&amount=3")
        return answer.status_code


@pytest.fixture(params=["before", "after"])
def invoices(request: pytest.FixtureRequest, project: Path) -> ModuleType:
    pytest.importorskip("greenlet")
    name: str = request.param
    return load(project, name, joined(files(TASKS), f"{name}.py"))


def test_both_programs_mail_audit_and_call_the_webhook(
    invoices: ModuleType, world: World
) -> None:
    world.hook_fails = 2
    assert invoiced(invoices, world, **{"x-user": "ada"}) == 200

    assert world.mails == ["bob@example.com: invoice 1"]
    assert world.rows("invoices") == [(1, "bob@example.com", 3)]
    assert world.rows("audit") == [(1, "ada", "invoice 1 from testclient")]
    assert [hook.read() for hook in world.hooks] == [b'{"id":1,"amount":3}'] * 3


def test_both_programs_do_nothing_for_a_request_that_is_refused(
    invoices: ModuleType, world: World
) -> None:
    assert invoiced(invoices, world) == 401
    assert (world.mails, world.hooks, world.rows("invoices")) == ([], [], [])


def test_a_mail_server_that_is_away_costs_the_tasks_the_invoice_and_the_handlers_nothing(
    invoices: ModuleType, world: World
) -> None:
    world.mail_is_down = True
    assert invoiced(invoices, world, **{"x-user": "ada"}) == 200

    there = 1 if invoices.__name__ == "after" else 0
    assert [len(world.rows(table)) for table in ("invoices", "audit")] == [there, there]
    assert len(world.hooks) == there


def test_the_tests_of_the_program_after_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("greenlet")
    parts = files(TASKS)
    (pytester.path / "after.py").write_text(joined(parts, "after.py"))
    (pytester.path / "test_after.py").write_text(parts["test_after.py"])
    monkeypatch.chdir(pytester.path)

    run_project(pytester, monkeypatch, passed=1)


def test_the_durable_webhook_is_called_again_with_the_same_key(
    project: Path, world: World
) -> None:
    pytest.importorskip("greenlet")
    parts = files(TASKS)
    source = joined(parts, "after.py")
    for title in ("the event", "the bus", "the webhook"):
        part = parts[f"after.py, {title}"]
        assert part in source
        source = source.replace(part, parts[f"after.py, {title}, durable"])
    imports = "from eventkit import EventBus\nfrom eventkit.sqlalchemy import deliver_on_commit\n"
    assert imports in source
    source = source.replace(
        imports,
        "from eventkit import EventBus, current_delivery, named\n"
        "from eventkit.outbox import Outbox, add_tables\n",
    )
    module = load(project, "durable", source)
    world.hook_fails = 1

    with TestClient(module.app, headers={"x-user": "ada"}) as client:
        module.app.state.client = world.client()
        assert client.post("/invoices?email=bob@example.com&amount=3").status_code == 200
        assert client.portal is not None
        client.portal.call(partial(module.outbox.run_due, within=60))

    assert len(world.hooks) == 2
    assert len({hook.headers["idempotency-key"] for hook in world.hooks}) == 1
    assert world.rows("eventkit_outbox") == []
