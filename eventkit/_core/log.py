"""Owns how eventkit logs: through structlog where the application configured it, else stdlib.

Unconfigured, structlog prints to stdout and never reaches Sentry or a log file; stdlib logging
always does what the application set up. Payloads of events are never logged.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping

import structlog


def log(
    level: int, message: str, /, *, error: BaseException | None = None, **facts: object
) -> None:
    """Write one line with its facts as key-value pairs.

    The facts are named in the template of the line, not written into it: all lines of one kind
    share their template, by which Sentry and log platforms group them.

    Args:
        level: One of stdlib's levels, for instance `logging.ERROR`.
        message: What happened, the same text each time.
        error: Its traceback is added to the line.
        facts: What it happened to. Their names are none of those that a `logging.LogRecord` has.
    """
    logger = _enabled_logger()
    if structlog.is_configured():
        try:
            _write(level, message, error, facts)
            return
        except Exception as broken:  # noqa: BLE001 - a processor is user code
            facts["structlog_failed"] = repr(broken)
    pairs = " ".join(f"{key}=%({key})s" for key in facts)
    template = f"{message.replace('%', '%%')}: {pairs}" if facts else message
    arguments = [facts] if facts else []
    try:
        logger.log(level, template, *arguments, exc_info=error, extra={"eventkit": facts})
    except Exception:  # noqa: BLE001 - a filter is user code; what is logged must not depend on it
        if logging.raiseExceptions:
            traceback.print_exc()


def _enabled_logger() -> logging.Logger:
    """The logger of the standard library, which structlog may write to as well.

    `dictConfig` and `fileConfig` disable by default each logger that they do not name. No failure
    may be silent because of that, so the logger is enabled again for each line. Its level and its
    filters are the user's.
    """
    logger = logging.getLogger("eventkit")
    logger.disabled = False
    return logger


def _write(
    level: int, message: str, error: BaseException | None, facts: Mapping[str, object]
) -> None:
    """Write it with structlog, by the one method that all its kinds of loggers share."""
    logger = structlog.get_logger("eventkit").bind()
    if isinstance(logger, structlog.stdlib.AsyncBoundLogger):
        logger = logger.sync_bl
    if error is not None:
        facts = {"exc_info": error, **facts}
    getattr(logger, logging.getLevelName(level).lower())(message, **facts)


def binds() -> bool:
    """Whether lines show what is given to `bind`: structlog merges it in, where it is told to.

    For those who know that structlog is configured.
    """
    merge = structlog.contextvars.merge_contextvars
    return any(processor is merge for processor in structlog.get_config()["processors"])


def bind(**facts: object) -> None:
    """Add facts to the log lines that code in these context variables writes with structlog."""
    structlog.contextvars.bind_contextvars(**facts)
