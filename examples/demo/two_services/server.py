"""Owns the process of one service in the demo: serves it, and tells what it does.

    python -m examples.demo.two_services.server billing

Nothing in the services is changed for this. A middleware of FastStream sees the messages.
`DEMO_HOLDS` names a request whose handlers do not come to their commit here, `DEMO_SPANS` a file
for what OpenTelemetry sees.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import anyio
from faststream import BaseMiddleware, StreamMessage
from sqlalchemy.event import listen
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from examples.demo.trace import Record
from examples.demo.witness import on_behalf_of, request_name, serve, tell

_FOR_EVER = 60.0  # seconds, which nobody waits for


class Doorman(BaseMiddleware[Any, Any]):  # Any: each broker has messages of its own
    """Tells when a message arrives, and when it was handled, just before the broker is answered."""

    async def consume_scope(
        self, call_next: Callable[[Any], Awaitable[Any]], msg: StreamMessage[Any]
    ) -> Any:
        with on_behalf_of(msg.correlation_id or ""):
            tell(Record(what="arrived", request=request_name()))
            result = await call_next(msg)
            tell(Record(what="taken", request=request_name()))
            return result


def hold(session: Session, *_: object) -> None:
    """Have a handler wait before it writes anything, for as long as its process lives."""
    if request_name() == os.environ.get("DEMO_HOLDS"):
        await_only(anyio.sleep(_FOR_EVER))


if __name__ == "__main__":
    service = import_module(f"examples.two_services.{sys.argv[1]}")
    service.broker.client.add_middleware(Doorman)
    listen(Session, "before_flush", hold)
    if spans := os.environ.get("DEMO_SPANS"):
        # Imported when used: it needs OpenTelemetry.
        from examples.demo.two_services.telemetry import instrument_service

        instrument_service(service, sys.argv[1], Path(spans))
    serve(service.app, service.bus, 0)
