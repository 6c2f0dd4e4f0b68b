"""The pages about other services do as they say, without a broker."""

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path

# Pages are modules whose contents no type checker knows.
from typing import Any

import pytest

pytest.importorskip("faststream")

import anyio
import httpx
from faststream.exceptions import NackMessage, RejectMessage

from eventkit.wire import Wired, decode, encode
from tests.faststream.services import KINDS, in_memory
from tests.project.messages import lines_of_log, texts, unsaid
from tests.project.pages import DOCS, RunPage, blocks, run_project
from tests.serving import ROOT

SERVICES, REFERENCE = DOCS / "services.md", DOCS / "services-reference.md"
PARTS = blocks(SERVICES, DOCS / "services-brokers.md", REFERENCE)
MODULES = ("shop_events", "orders", "billing", "readable")
NAMES = {"rabbit": "RabbitMQ", "redis": "Redis", "kafka": "Kafka"}


def put(text: str, pattern: str, block: str) -> str:
    """Have a block stand where the pattern is found, once."""
    new, times = re.subn(pattern, lambda _: block.rstrip(), text, flags=re.DOTALL | re.MULTILINE)
    assert times == 1, pattern
    return new


def program(file: str, kind: str = "nats", *, durable: bool = False) -> str:
    """A service of the page, edited as the page tells its readers."""
    text = PARTS[file]
    bridge = r"^bridge\.(forward|consume)\([^\n]*\)$"
    if kind != "nats":
        text = put(text, r"^from faststream\.nats import [^\n]*\n(from nats[^\n]*\n)?", "")
        wiring = PARTS[f"{file}, with {NAMES[kind]}"]
        text = put(text, r"^broker = .*?" + bridge, wiring)
        lifespan = PARTS.get(f"{file}, the lifespan with {NAMES[kind]}")
        if lifespan is not None:
            text = put(text, r"^@asynccontextmanager.*?^        yield\n", lifespan + "\n")
    if durable:
        verb = "forward" if file == "orders.py" else "consume"
        text = put(text, bridge, PARTS[f"{file}, instead of bridge.{verb}(...)"])
        if file == "orders.py":
            text = put(text, r"^@app\.post.*", PARTS[f"{file}, instead of the endpoint"])
        else:
            handler = r"^@bus\.on.*?flush=True\)$"
            text = put(text, handler, PARTS[f"{file}, instead of the handler"])
    return text


@dataclass(frozen=True, slots=True)
class Page:
    """Modules of the page, in a folder of their own."""

    folder: Path

    def write(self, kind: str = "nats", *, durable: bool = False) -> None:
        (self.folder / "shop_events.py").write_text(PARTS["shop_events.py"])
        for name in ("orders.py", "billing.py"):
            (self.folder / name).write_text(program(name, kind, durable=durable))

    def load(self, name: str) -> Any:
        return importlib.import_module(name)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield Page(tmp_path)
    for name in MODULES:
        opened = vars(sys.modules.pop(name, object))
        if "outbox" in opened:
            opened["outbox"].detach()
            opened["engine"].dispose()


@pytest.fixture
def anyio_backend() -> str:
    """FastStream runs on asyncio alone."""
    return "asyncio"


async def send(kind: str, billing: Any, wired: Wired) -> None:
    """Publish as a sender of the page does."""
    headers = wired.headers("ce_" if kind == "kafka" else "ce-")
    places: Mapping[str, dict[str, Any]] = {
        "nats": {"subject": "orders.placed", "stream": "orders"},
        "rabbit": {"queue": "billing", "exchange": getattr(billing, "orders", None)},
        "redis": {"stream": "orders"},
        "kafka": {"topic": "orders"},
    }
    await billing.broker.publish(wired.body, headers=headers, **places[kind])


@pytest.mark.anyio
@pytest.mark.parametrize("durable", [False, True], ids=["in memory", "durable"])
@pytest.mark.parametrize("kind", KINDS)
async def test_orders_sends_and_billing_writes_an_invoice(
    page: Page, capsys: pytest.CaptureFixture[str], kind: str, durable: bool
) -> None:
    page.write(kind, durable=durable)
    orders, billing = page.load("orders"), page.load("billing")

    async with in_memory(orders.broker):
        transport = httpx.ASGITransport(orders.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://orders") as client:
            answer = await client.post("/orders/7")
        assert answer.json() == "order 7 is placed"
        orders.placed.mock.assert_called_once()

    order = orders.OrderPlaced(7, "ada", Decimal("9.90"))
    async with in_memory(billing.broker):
        await send(kind, billing, encode(order, source="/orders"))
        await send(kind, billing, encode(order, source="/orders"))

    invoices = capsys.readouterr().out.count("invoice for order 7: 9.90")
    assert invoices == (1 if durable else 2)  # the second message is the first one again
    assert billing.bus.stats.failed == orders.bus.stats.failed == 0


def test_the_tests_of_the_page_test_the_pages_program(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    Page(pytester.path).write()
    tests = {name: block for name, block in PARTS.items() if name.startswith("test_")}
    assert len(tests) == 2
    for name, block in tests.items():
        (pytester.path / name).write_text(block)

    run_project(pytester, monkeypatch, passed=2)


@pytest.mark.anyio
async def test_a_handler_of_the_page_says_never_and_later(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.write()
    path = page.folder / "billing.py"
    path.write_text(path.read_text() + PARTS["billing.py, another handler"])
    billing = page.load("billing")
    answers = iter([503, 500, 200])
    transport = httpx.MockTransport(lambda _: httpx.Response(next(answers)))
    monkeypatch.setattr(httpx, "AsyncClient", partial(httpx.AsyncClient, transport=transport))

    with pytest.raises(RejectMessage):
        await billing.charge(billing.OrderPlaced(1, "ada", Decimal(-1)))
    order = billing.OrderPlaced(1, "ada", Decimal(1))
    with pytest.raises(NackMessage):
        await billing.charge(order)
    with pytest.raises(httpx.HTTPStatusError):
        await billing.charge(order)
    await billing.charge(order)


@pytest.mark.anyio
async def test_the_page_describes_its_events_in_asyncapi(page: Page) -> None:
    page.write()
    orders = page.folder / "orders.py"
    text = orders.read_text()
    with_schema = put(text, r"stream=orders\)$", "stream=orders, schema=OrderPlaced)")
    orders.write_text(with_schema)
    path = page.folder / "billing.py"
    path.write_text(path.read_text() + PARTS["billing.py, its AsyncAPI"])

    described = await page.load("billing").asyncapi()
    assert "customer" in described["components"]["schemas"]["OrderPlaced"]["properties"]

    sent = importlib.import_module("faststream.specification").AsyncAPI(page.load("orders").broker)
    assert '"customer"' in sent.to_specification().to_json()
    assert "schema=OrderPlaced" in REFERENCE.read_text()


@pytest.mark.anyio
async def test_others_read_and_write_the_format_of_the_page_for_redis(page: Page) -> None:
    import json

    from faststream.redis.parser import BinaryMessageFormatV1

    page.write()
    (page.folder / "readable.py").write_text(PARTS["readable.py"])
    readable = page.load("readable").Readable
    event: object = page.load("shop_events").OrderPlaced(7, "ada", Decimal("9.90"))
    wired = encode(event, source="/orders")
    given: dict[str, Any] = {"message": wired.body, "reply_to": "", "correlation_id": "c"}

    entry = json.loads(await readable.encode(**given, headers=wired.headers()))
    assert entry["headers"]["ce-type"] == "shop.order.placed.v1"
    assert json.loads(entry["data"])["total"] == "9.90"

    binary = await BinaryMessageFormatV1.encode(**given, headers=wired.headers())
    for raw in (json.dumps(entry).encode(), binary):
        body, headers = readable.parse(raw)
        assert decode(headers, body, type(event)).event == event


def test_the_headers_that_the_page_shows_are_those_that_are_sent(page: Page) -> None:
    page.write()
    event: object = page.load("shop_events").OrderPlaced(7, "ada", Decimal("9.90"))
    (shown,) = re.findall(r"^```\n(ce-.*?)\n\n(.*?)\n```", REFERENCE.read_text(), re.M | re.S)
    headers = dict(line.split(": ", 1) for line in shown[0].splitlines())
    wired = encode(event, source="/orders")

    assert headers.keys() == wired.headers().keys()
    received: Any = decode(headers, shown[1].encode(), type(event)).event
    assert str(received.event_id) == headers["ce-id"]
    assert received == event


def test_the_page_reads_what_older_senders_send(run_page: RunPage) -> None:
    services = run_page(SERVICES)
    headers = {"ce-id": "1", "ce-source": "/old", "ce-type": "shop.order.placed.v1"}
    body = b'{"number": 7, "customer": "ada", "total": "9.90"}'

    event: Any = decode(headers, body, services.OrderPlaced).event
    assert (event.number, event.currency) == (7, "EUR")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_pages_own_client_runs_on_each_event_loop(backend: str, run_page: RunPage) -> None:
    services = run_page(REFERENCE)
    services.invoiced.clear()

    async def send() -> httpx.Response:
        await services.sending.dispatch(services.order)
        answer: httpx.Response = await services.client.post("/events", content=b"{}")
        return answer

    answer = anyio.run(send, backend=backend)
    assert services.invoiced == [services.order]
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("foreign: no CloudEvent")


def test_the_errors_and_log_lines_that_the_page_has_are_those_of_the_package() -> None:
    reference, services = REFERENCE.read_text(), SERVICES.read_text()
    errors = reference[reference.index("## Errors at wiring") : reference.index("## Limits")]
    told = re.findall(r"^\| [^|]+ \| `([^`]+)` \|$", errors, re.M) + lines_of_log(SERVICES)
    reasons = re.findall(r"^\| `([a-z]+)` \| ", services[: services.index("To **replay**")], re.M)

    assert len(told) > 20
    assert unsaid(told, "faststream", "wire") == []
    assert {*reasons} >= {"failed", "rejected", "crashed", "unknown", "undecodable", "foreign"}
    assert {*reasons} <= {*texts("faststream", "wire")}


def test_every_part_of_the_page_is_run_by_a_test() -> None:
    tests = Path(__file__).read_text() + (ROOT / "tests/brokers/test_docs.py").read_text()
    by_their_first_words = ("with ", "the lifespan with ", "instead of ")
    for title in PARTS:
        file, _, part = title.partition(", ")
        if not file.startswith("test_") and not part.startswith(by_their_first_words):
            assert title in tests, title
