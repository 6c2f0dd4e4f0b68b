"""The tutorial is followed as its readers do: its files are written, its commands run, and what is
shown is compared with what is seen."""

import asyncio
import http.client
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import uuid4

import anyio
import pytest
import structlog
from fastapi import FastAPI
from faststream.nats import TestNatsBroker
from starlette.testclient import TestClient

from eventkit import EventBus
from eventkit.wire import encode
from tests.project.pages import replaced
from tests.serving import PATIENCE, ROOT, Server, eventually, on_uvicorn, run_python, serving

TUTORIAL = ROOT / "docs" / "tutorial"
STEPS = sorted(TUTORIAL.glob("[1-9]-*.md"))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ([\w/]+\.py)\n")
NOT_RUN = (
    "pip install",
    "docker run",
    "git clone",
    "mkdir",
    "cd ",
    "python3 -m venv",
    "source ",
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page: its language, the title that is shown above it, and its text."""

    language: str
    title: str
    text: str


def blocks_of(text: str) -> list[Block]:
    return [Block(*each.groups(default="")) for each in BLOCK.finditer(text)]


def masked(text: str) -> str:
    """The text without what differs between two runs: ports, ids, times and folders."""
    for pattern, instead in (
        (r"127\.0\.0\.1:\d+", "127.0.0.1:PORT"),
        (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID"),
        (r" in \d+\.\d+s", " in SECONDS"),
        (r"/[\w./-]*/(?=(shop|tests)/)", "FOLDER/"),
        (r"process \[\d+\]", "process [PID]"),
        (r"\s+\d+ s ago\s+", " SOME s ago "),
    ):
        text = re.sub(pattern, instead, text)
    return text


def pattern_of(shown: str) -> str:
    """A regular expression for what a page shows; `...` is some text of a line."""
    return re.escape(masked(shown)).replace(re.escape("..."), ".*")


def save(path: Path, text: str) -> None:
    """Write a module, and forget its bytecode: a second version may come within a second."""
    path.write_text(text)
    Path(cache_from_source(str(path))).unlink(missing_ok=True)


@dataclass
class Reader:
    """Follows the pages in a folder.

    Attributes:
        folder: Where the reader's files are.
        edits: What to write instead of some texts of the files, because a test has less time.
        printed: What the commands of the latest block have printed.
    """

    folder: Path
    edits: Mapping[str, str] = field(default_factory=dict[str, str])
    printed: str = ""
    _servers: dict[str, tuple[ExitStack, Server]] = field(
        default_factory=dict[str, tuple[ExitStack, Server]]
    )
    _seen: dict[str, int] = field(default_factory=dict[str, int])

    def write(self, block: Block) -> None:
        name = NAMED.match(block.text)
        if name is None:  # another way to do it, which has a test of its own
            return
        path = self.folder / name[1]
        path.parent.mkdir(exist_ok=True)
        save(path, self._edited(block.text))

    def write_all(self, pages: list[Path]) -> None:
        """Catch up: have the files that these pages end with."""
        for page in pages:
            self.write_text(page.read_text())

    def write_text(self, text: str) -> None:
        for block in blocks_of(text):
            if block.language == "python":
                self.write(block)

    def follow(self, blocks: list[Block]) -> None:
        for block in blocks:
            if block.language == "python":
                self.write(block)
            elif block.language == "sh":
                self.printed = ""
                if block.title.startswith("without the line "):
                    self._without(block.title.removeprefix("without the line "), block.text)
                else:
                    self._run_all(block.text)
            elif block.language == "text":
                self._compare(block)

    def close(self) -> None:
        """Stop all servers."""
        for app in [*self._servers]:
            self._stop(app)

    def _run_all(self, text: str) -> None:
        for line in text.splitlines():
            self.run(line)

    def run(self, line: str) -> None:
        """Run a command as a shell does, of those that the pages have."""
        if line.startswith(NOT_RUN):
            return
        variables = dict(re.findall(r"^(\w+)=(\S+) ", self._edited(line)))
        words = shlex.split(line)[len(variables) :]
        command, *arguments = words
        if command == "uvicorn":
            self._serve(arguments[0], variables)
        elif command == "curl":
            self.printed += self.ask(arguments) + "\n"
        elif command == "kill":
            found = re.fullmatch(r'kill -9 \$\(pgrep -f "uvicorn (\S+)"\)', line)
            assert found, line
            _, server = self._servers[found[1]]
            server.signal(signal.SIGKILL)
            server.wait()
        elif command == "rm":
            (name,) = arguments
            self.close()
            (self.folder / name).unlink(missing_ok=True)
        else:
            self.printed += self._call(command, arguments)

    def _edited(self, text: str) -> str:
        for old, new in self.edits.items():
            text = text.replace(old, new)
        return text

    def _call(self, command: str, arguments: list[str]) -> str:
        module = {"pytest": ["-m", "pytest"], "eventkit": ["-m", "eventkit"], "python": []}[command]
        if command == "pytest":
            arguments = [*arguments, "-p", "no:cacheprovider", "-W", "error"]
        done = run_python(*module, *arguments, cwd=self.folder, patience=4 * PATIENCE)
        assert not done.stderr or command == "pytest", done.stderr
        return done.stdout

    def _serve(self, app: str, variables: Mapping[str, str]) -> None:
        if app in self._servers:
            self._stop(app)

        stack = ExitStack()
        run = serving(on_uvicorn(app, folder=self.folder), env=variables, cwd=self.folder)
        self._servers[app] = stack, stack.enter_context(run)
        self._seen[app] = 0

    def _stop(self, app: str) -> None:
        stack, _ = self._servers.pop(app)
        stack.close()

    def ask(self, arguments: list[str]) -> str:
        """What curl prints: the body of the answer."""
        method, headers, url = "GET", dict[str, str](), ""
        words = iter(arguments)
        for word in words:
            if word == "-X":
                method = next(words)
            elif word == "-H":
                name, _, value = next(words).partition(": ")
                headers[name] = value
            else:
                url = word
        found = re.fullmatch(r"localhost:8000(/.*)", url)
        assert found, url
        _, server = self._servers["shop.main:app"]
        with closing(server.connect()) as connection:
            connection.request(method, found[1], headers=headers)
            response: http.client.HTTPResponse = connection.getresponse()
            return response.read().decode()

    def _without(self, line: str, commands: str) -> None:
        path = self.folder / "shop" / "app.py"
        text = path.read_text()
        assert text.count(f"    {line}\n") == 1
        save(path, text.replace(line, f"# {line}"))
        try:
            self._run_all(commands)
        finally:
            save(path, text)

    def _compare(self, block: Block) -> None:
        terminal = re.match(r"the terminal of (\w+)", block.title)
        shown = pattern_of(block.text)
        if terminal is None:
            matches = re.search if block.title == "among other lines" else re.fullmatch
            seen = masked(self.printed)
            assert matches(shown, seen), f"{block.text}\nis shown, and this is printed:\n{seen}"
            return
        app = {"uvicorn": "shop.main:app", "billing": "billing.main:app"}[terminal[1]]
        _, server = self._servers[app]
        if block.title.endswith("after Ctrl+C"):
            self._wait_for_the_parcel()
            server.signal(signal.SIGINT)
            server.wait()
        eventually(
            lambda: re.search(shown + r"\Z", self._unread(app)),
            lambda: f"{block.text}\nis shown, and this is written:\n{self._unread(app)}",
        )
        self._seen[app] = len(server.output)

    def _unread(self, app: str) -> str:
        _, server = self._servers[app]
        return masked(server.output[self._seen[app] :])

    def _wait_for_the_parcel(self) -> None:
        """Wait until the mail alone is under way."""
        eventually(
            lambda: "8" in self.ask(["localhost:8000/parcels"]),
            lambda: "the parcel of order 8 is not packed",
        )


# What takes less time in a test: a killed process is taken for dead sooner, and the mail server is
# slow only in steps where something has to happen in the middle of a mail.
QUICK = {"Outbox(bus, engine)": "Outbox(bus, engine, lease=1.5)", "sleep(2)": "sleep(0.2)"}
MAIL_SECONDS = {"4": "5", "6": "1"}
SECOND_SERVICE = "## A second service\n"


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path, QUICK)
    yield reader
    reader.close()


@pytest.mark.parametrize("step", STEPS, ids=[page.stem for page in STEPS])
def test_the_step_does_as_it_shows(reader: Reader, step: Path) -> None:
    number = step.stem[0]
    reader.edits = {**QUICK, "sleep(2)": f"sleep({MAIL_SECONDS.get(number, '0.2')})"}
    reader.write_all([page for page in STEPS if page < step])
    text, _, _ = step.read_text().partition(SECOND_SERVICE)
    reader.follow(blocks_of(text))


def test_the_tests_of_the_whole_tutorial_need_no_broker(reader: Reader) -> None:
    reader.write_all(STEPS)
    reader.run("pytest -q")
    assert "6 passed" in reader.printed


def test_the_engine_of_the_tutorial_may_be_made_in_the_lifespan(reader: Reader) -> None:
    reader.write_all(STEPS[:3])
    page = STEPS[2].read_text()
    (instead,) = [
        block.text for block in blocks_of(page) if block.text.startswith("# shop/app.py, the life")
    ]
    path = reader.folder / "shop" / "app.py"
    before, _, _ = path.read_text().partition("def create_app")
    path.write_text(before + instead)

    _, _, run_it = page.partition("## Run it\n")
    reader.follow([block for block in blocks_of(run_it) if block.language != "python"])


def test_the_whole_tutorial_has_the_files_of_its_tree(reader: Reader) -> None:
    reader.write_all(STEPS)
    written = {path.relative_to(reader.folder).as_posix() for path in reader.folder.rglob("*.py")}

    shown: set[str] = set()
    folder = ""
    for line in (TUTORIAL / "index.md").read_text().splitlines():
        if entry := re.match(r"[│ ]*[├└]── ([\w./]+)", line):
            nested = line.startswith(("│", " "))
            if entry[1].endswith("/"):
                folder = entry[1]
            else:
                shown.add(folder * nested + entry[1])
    assert shown == written


def test_type_checkers_find_nothing_in_the_tutorial(reader: Reader) -> None:
    for steps in (STEPS[:2], STEPS[2:4], STEPS[4:]):
        reader.write_all(steps)
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "."],
            cwd=reader.folder,
            env={**os.environ, "MYPYPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{steps[-1].name}: {done.stdout}{done.stderr}"


Load = Callable[[str], Any]  # Any: what the pages define


@pytest.fixture
def load(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports modules of the reader's folder."""
    monkeypatch.setattr(sys, "path", [str(reader.folder), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield importlib.import_module
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("shop", "billing"):
            del sys.modules[name]
    structlog.reset_defaults()


def shop_of_step_4(reader: Reader, load: Load, edits: Mapping[str, str]) -> FastAPI:
    """The application of step 4, with other texts in `shop/app.py`."""
    reader.write_all(STEPS[:4])
    path = reader.folder / "shop" / "app.py"
    path.write_text(replaced(path.read_text(), edits))
    load("shop.logs").configure_log()
    settings = load("shop.settings").Settings(f"sqlite+aiosqlite:///{reader.folder}/shop.db")
    app: FastAPI = load("shop.app").create_app(settings)
    return app


def test_the_line_of_discarded_events_has_the_id_of_the_request(
    reader: Reader, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without transactions it is the end of the request that decides.
    app = shop_of_step_4(reader, load, {"    deliver_on_commit(bus, engine)\n": ""})
    app.dependency_overrides[load("shop.dependencies").get_mailer] = AsyncMock
    with TestClient(app) as client:
        for _ in range(2):
            client.post("/orders/7?email=ada@example.org", headers={"X-Request-ID": "r2"})

    (line,) = [each for each in capsys.readouterr().out.splitlines() if "discarded  " in each]
    assert "request_id=r2" in line


def test_a_page_may_read_the_503_of_an_overload(reader: Reader, load: Load) -> None:
    bounds = "bus=bus, background=True, concurrency=1, max_pending=1, overload_timeout=0.01"
    app = shop_of_step_4(reader, load, {"Middleware, bus=bus": f"Middleware, {bounds}"})
    sent = anyio.Event()

    class Mailer:
        async def send(self, to: str, text: str) -> None:
            await sent.wait()

    app.dependency_overrides[load("shop.dependencies").get_mailer] = Mailer
    page = {"Origin": "https://shop.example"}
    with TestClient(app) as client:
        # One is delivered, one waits, and one is refused.
        *_, answer = [client.post(f"/orders/{each}?email=a", headers=page) for each in range(3)]
        assert client.portal is not None
        client.portal.call(sent.set)

    assert answer.status_code == 503
    assert "access-control-allow-origin" in answer.headers


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_second_service_reads_what_the_shop_forwards(
    reader: Reader, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a broker: FastStream's test broker stands for it."""
    reader.write_all(STEPS)
    bus = EventBus()
    broker = load("shop.broker").connect(bus, "nats://localhost:4222")
    event: object = load("shop.events").OrderPlaced(8, "ada@example.org")
    async with TestNatsBroker(broker):
        await bus.dispatch(event)
        (placed,) = broker.publishers
        placed.mock.assert_called_once()

    billing = load("billing.main")
    sent = encode(event, source="/shop")
    async with TestNatsBroker(billing.broker):
        await billing.broker.publish(
            sent.body, "orders.placed", stream="orders", headers=sent.headers()
        )
    assert capsys.readouterr().out == "invoice for order 8, to ada@example.org\n"


def test_the_second_service_writes_an_invoice(
    reader: Reader, service_url: Callable[[str], str]
) -> None:
    url = service_url("nats")
    places = {f'"{place}': f'"{place}-{uuid4().hex[:8]}' for place in ("orders", "dead")}
    reader.edits = {**QUICK, **places, "nats://localhost:4222": url}
    reader.write_all(STEPS[:5])
    before, _, after = STEPS[5].read_text().partition(SECOND_SERVICE)
    reader.write_text(before)
    try:
        reader.follow(blocks_of(after))
    finally:
        reader.close()
        asyncio.run(delete(url, [place.strip('"') for place in places.values()]))


async def delete(url: str, streams: list[str]) -> None:
    nats: Any = importlib.import_module("nats")  # its types are partial
    async with await nats.connect(url) as client:
        for stream in streams:
            with suppress(Exception):
                await client.jetstream().delete_stream(stream)
