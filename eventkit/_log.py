"""Owns how eventkit logs: through structlog where the application configured it, else stdlib.

Unconfigured, structlog prints to stdout and never reaches Sentry or a log file; stdlib logging
always does what the application set up. Payloads of events are never logged.
"""

from __future__ import annotations

import logging
from contextvars import Context

import structlog

_stdlib = logging.getLogger("eventkit")


def log(
    level: int, message: str, /, *, error: BaseException | None = None, **facts: object
) -> None:
    """Write one line with its facts as key-value pairs.

    Args:
        level: One of stdlib's levels, for instance `logging.ERROR`.
        message: What happened, the same text each time.
        error: Its traceback is added to the line.
        facts: What it happened to.
    """
    if structlog.is_configured():
        logger = structlog.stdlib.get_logger("eventkit")
        logger.log(level, message, exc_info=error, **facts)
        return
    pairs = " ".join(f"{key}={value}" for key, value in facts.items())
    _stdlib.log(level, "%s: %s", message, pairs, exc_info=error, extra={"eventkit": facts})


def bind(variables: Context, **facts: object) -> None:
    """Add facts to the log lines that code in these context variables writes with structlog."""
    if structlog.is_configured():
        variables.run(structlog.contextvars.bind_contextvars, **facts)
