"""Owns how eventkit logs: with structlog if the application has configured it, else with stdlib.

An unconfigured structlog prints to stdout, and its lines reach neither Sentry nor a log file.
stdlib logging always follows the application's setup. Payloads of events are never logged.
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

    The template of the line has the names of the facts, not their values. So all lines of one kind
    have the same template, and Sentry and log platforms can group them by it.

    Args:
        level: One of stdlib's levels, for example `logging.ERROR`.
        message: What happened: always the same text.
        error: An exception; its traceback is added to the line.
        facts: The details. No name may be that of an attribute of `logging.LogRecord`.
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
    except Exception:  # noqa: BLE001 - a filter is user code, and its error must not end the caller
        if logging.raiseExceptions:
            traceback.print_exc()


def _enabled_logger() -> logging.Logger:
    """The logger of the standard library. structlog may write to it as well.

    `dictConfig` and `fileConfig` disable all loggers that they do not name, by default. This must
    not hide a failure, so each line enables the logger again. Its level and its filters stay as the
    user has set them.
    """
    logger = logging.getLogger("eventkit")
    logger.disabled = False
    return logger


def _write(
    level: int, message: str, error: BaseException | None, facts: Mapping[str, object]
) -> None:
    """Write the line with structlog, in a way that works with all its kinds of loggers."""
    logger = structlog.get_logger("eventkit").bind()
    if isinstance(logger, structlog.stdlib.AsyncBoundLogger):
        logger = logger.sync_bl
    if error is not None:
        facts = {"exc_info": error, **facts}
    getattr(logger, logging.getLevelName(level).lower())(message, **facts)


def binds() -> bool:
    """Whether structlog adds the facts of `bind` to its lines: a processor has to be configured.

    Only for callers that have checked that structlog is configured.
    """
    merge = structlog.contextvars.merge_contextvars
    return any(processor is merge for processor in structlog.get_config()["processors"])


def bind(**facts: object) -> None:
    """Add facts to structlog's lines from code with the current context variables."""
    structlog.contextvars.bind_contextvars(**facts)
