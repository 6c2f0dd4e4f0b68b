"""Owns the demo's other mode: the shop stays up, and what happens is printed as it happens."""

from __future__ import annotations

import sys
from datetime import datetime

from rich.console import Console
from rich.text import Text

from examples.demo.neighbours import Mail, neighbourhood
from examples.demo.process import ShopDidNotStart, shop_process, until_signal
from examples.demo.trace import Record, Trace

_TRY = """\

The shop is up, with all its neighbours beside it. In another terminal:

  curl {shop}/users --json '{{"name": "Ada", "email": "ada@example.com"}}'
      Again: 409, nothing is published.

  curl {shop}/orders --json \\
      '{{"email": "ada@example.com", "lines": [{{"sku": "tea", "quantity": 2}}]}}'
      With another line for 5 "teapot": 409, what was published is discarded.
      With 90 "tea": 402, only the audit log hears of it.
      To {shop}/orders/check: 200, and nobody hears of it.

  curl -X POST {warehouse}/down
      The webhook fails from now on, and is tried again; nothing else fails. /up mends it.

  SHOP_DATABASE_URL={database} \\
    {python} -m eventkit outbox list --state all examples.shop.main:outbox
      What is owed still. `stats` counts it, and `retry` has what is dead tried again.

Ctrl-C ends everything. What happens:
"""


async def serve(console: Console, *, port: int) -> bool:
    """Keep the shop running and print what it does, until SIGINT or SIGTERM.

    What is pending then is still delivered, and printed.

    Returns:
        False where the shop could not start, or ended by itself.
    """
    live = _Live(console)
    trace = Trace(on_record=live.record)
    asked_to_end = False
    with neighbourhood(on_mail=live.mail) as around:
        try:
            async with shop_process(around.settings, trace, log=None, port=port) as process:
                shop = f"http://127.0.0.1:{trace.port}"
                live.print(
                    Text(
                        _TRY.format(
                            shop=shop,
                            warehouse=around.warehouse.url,
                            database=around.settings.database_url,
                            python=sys.executable,
                        )
                    )
                )
                async with until_signal():
                    await process.wait()
                asked_to_end = process.returncode is None
        except* ShopDidNotStart:
            live.print(Text("The shop did not start. Why, it said above."))
    return asked_to_end


class _Live:
    """Prints records and mails, each on a line of its own, from whatever thread."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_ns: dict[str, int] = {}

    def print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)

    def mail(self, mail: Mail) -> None:
        """Called in the mail server's thread."""
        self._line("mail", f"{mail.subject!r} has arrived for {mail.to}", "magenta")

    def record(self, record: Record) -> None:
        match record.what:
            case "sent":
                self._line("response", f"{record.line} → {record.status}", "cyan")
            case "committed" if not record.delivery:
                self._line("commit", "", "yellow")
            case "started":
                self._started_ns[record.delivery] = record.at_ns
            case "ended":
                took_ms = (record.at_ns - self._started_ns.pop(record.delivery)) / 1e6
                style = "red" if record.error else "green"
                self._line(
                    "handler", f"{_who(record)} {took_ms:.1f} ms {record.error}".rstrip(), style
                )
            case "skipped":
                self._line(record.outcome, _who(record), "yellow")
            case _:
                pass

    def _line(self, what: str, text: str, style: str) -> None:
        at = f"{datetime.now().astimezone():%H:%M:%S.%f}"[:-3]
        self.print(Text.assemble((at, "dim"), "  ", (f"{what:10}", style), text))


def _who(record: Record) -> str:
    return f"{record.event} → {record.handler}"
