"""Owns the shop's neighbours: mail server, warehouse and payment provider, real ones on loopback.

Each is a context manager, listens on a free port, runs in threads of its own and remembers what
reached it. Knows nothing of eventkit, so tests use them too.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Self

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from examples.demo.trace import clock_ns
from examples.shop.settings import Settings

# How long they take. The shop and eventkit know nothing of it; it makes bars that can be seen.
_MAIL_SECONDS, _WAREHOUSE_SECONDS, _PAYMENT_SECONDS = 0.040, 0.015, 0.020
_LEASE_SECONDS = 1.5  # the least that there is, so that others take over soon
_POLL_SECONDS = 0.01  # how soon an HTTP server notices that it should close


@dataclass(frozen=True, slots=True)
class Mail:
    """One mail that the server accepted, and when."""

    to: str
    subject: str
    received_ns: int


def _ignore(_: Mail) -> None:
    """Do nothing with a mail but keep it."""


class MailServer:
    """Accepts every mail, after thinking about it for `delay` seconds.

    `on_mail` is called in the server's thread before the sender hears that the mail was accepted.
    A sender who leaves before is not heard to the end: the mail has not come.

    Attributes:
        mails: What was accepted.
        delay: Seconds, for the mails to come.
        thinking: Set while it thinks about a mail.
    """

    def __init__(self, *, delay: float = 0.0, on_mail: Callable[[Mail], None] = _ignore) -> None:
        self.mails: list[Mail] = []
        self.delay = delay
        self.thinking = Event()
        self._on_mail = on_mail
        self._controller = _FreePortController(self, hostname="127.0.0.1", port=0)

    @property
    def port(self) -> int:
        """Where it listens, once entered."""
        return self._controller.port

    def to(self, address: str) -> list[Mail]:
        """What has arrived for this address."""
        return [mail for mail in self.mails if mail.to == address]

    def __enter__(self) -> Self:
        self._controller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._controller.stop()

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Called by aiosmtpd for each mail, under this name; what it returns is the answer."""
        del server, session
        self.thinking.set()
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.thinking.clear()
        assert isinstance(envelope.content, bytes)
        subject = str(message_from_bytes(envelope.content, policy=policy.default)["Subject"])
        for address in envelope.rcpt_tos:
            mail = Mail(address, subject, clock_ns())
            self.mails.append(mail)
            self._on_mail(mail)
        return "250 OK"


class _FreePortController(Controller):
    """aiosmtpd's controller, also for port 0: learns the port before it tries to connect."""

    def _trigger_server(self) -> None:
        assert isinstance(self.server, asyncio.Server)
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()  # type: ignore[no-untyped-call]


class _HttpServer:
    """Answers POST requests as `answer` decides; without a decision it hangs up."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = Thread(target=self._server.serve_forever, args=(_POLL_SECONDS,))

    @property
    def url(self) -> str:
        """Where it listens, without a path."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, headers: Mapping[str, str], body: bytes) -> int | None:
        """Decide on one request."""
        raise NotImplementedError

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        answer = self.answer

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status = answer(self.path, dict(self.headers), body)
                if status is not None:
                    self.send_response(status)
                    self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Stay quiet."""

        return Handler


class Warehouse(_HttpServer):
    """Takes reports on stock, after `delay` seconds.

    `POST /down` and `POST /up` switch it from outside.

    Attributes:
        down: Answers 503.
        unknown: It does not know these, and answers 422.
        reports: What was taken.
    """

    def __init__(self, *, delay: float = 0.0) -> None:
        super().__init__()
        self.down = False
        self.unknown: set[str] = set()
        self.reports: list[object] = []
        self._delay = delay

    def answer(self, path: str, headers: Mapping[str, str], body: bytes) -> int:
        """Decide on one request."""
        if path in ("/down", "/up"):
            self.down = path == "/down"
            return 204
        time.sleep(self._delay)
        if self.down:
            return 503
        report = json.loads(body)
        if report["sku"] in self.unknown:
            return 422
        self.reports.append(report)
        return 204


class PaymentProvider(_HttpServer):
    """Collects money, once for each `Idempotency-Key`, as Stripe does and an IETF draft says.

    Attributes:
        declines: Answers 402 to whoever asks for the first time.
        answers_to_lose: So many of the next requests are carried out, but not answered.
        requests: The keys that were asked with, in order.
        charges: What was collected, by key.
    """

    def __init__(self, *, delay: float = 0.0) -> None:
        super().__init__()
        self.declines = False
        self.answers_to_lose = 0
        self.requests: list[str] = []
        self.charges: dict[str, object] = {}
        self._delay = delay

    def answer(self, path: str, headers: Mapping[str, str], body: bytes) -> int | None:
        """Decide on one request."""
        time.sleep(self._delay)
        key = headers["Idempotency-Key"]
        self.requests.append(key)
        if key not in self.charges and self.declines:
            return 402
        self.charges.setdefault(key, json.loads(body))
        if self.answers_to_lose:
            self.answers_to_lose -= 1
            return None
        return 201


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """All that is around a shop, up and running.

    Attributes:
        is_traced: Whether the shop writes its spans.
    """

    mails: MailServer
    warehouse: Warehouse
    payments: PaymentProvider
    directory: Path
    is_traced: bool = False

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.directory / "shop.db"

    @property
    def log(self) -> Path:
        """Where the shop's process may write what it has to say."""
        return self.directory / "shop.log"

    @property
    def spans(self) -> Path:
        """Where the shop writes its spans, if it does."""
        return self.directory / "spans.jsonl"

    @property
    def settings(self) -> Settings:
        """Where the shop finds everything."""
        return Settings(
            database_url=f"sqlite:///{self.database}",
            smtp_port=self.mails.port,
            warehouse_url=f"{self.warehouse.url}/stock",
            payments_url=f"{self.payments.url}/charges",
            lease_seconds=_LEASE_SECONDS,
            spans=str(self.spans) if self.is_traced else "",
        )


@contextmanager
def neighbourhood(on_mail: Callable[[Mail], None] = _ignore) -> Generator[Neighbourhood]:
    """Put everything up for a shop, and take it down and away at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="eventkit-demo-") as directory,
        MailServer(delay=_MAIL_SECONDS, on_mail=on_mail) as mails,
        Warehouse(delay=_WAREHOUSE_SECONDS) as warehouse,
        PaymentProvider(delay=_PAYMENT_SECONDS) as payments,
    ):
        yield Neighbourhood(mails, warehouse, payments, Path(directory))
