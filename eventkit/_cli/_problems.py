"""Owns the report of a mistake: one line on stderr, no traceback, and the exit code."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from click import ClickException

from eventkit.exceptions import OutboxSchemaError

EXIT_CODES = """\b
Exit codes:
  0  done; for `relay`: ended by a signal
  1  a given delivery was not found, or something failed
  2  wrong usage; nothing was done
  3  the database does not answer, or its tables are missing
"""


class Failure(ClickException):
    """Something failed, or was not found."""

    exit_code = 1


class Mistake(ClickException):
    """The command was given wrong arguments."""

    exit_code = 2


class DatabaseProblem(ClickException):
    """The database does not answer, or its tables are missing."""

    exit_code = 3


@contextmanager
def asking_the_database() -> Generator[None]:
    """Turn each failure in the block into one line about the database.

    Not all errors of drivers derive from those of SQLAlchemy or of the system.
    """
    try:
        yield
    except ClickException:
        raise
    except OutboxSchemaError as error:
        raise schema_problem(error) from error
    except Exception as error:
        raise DatabaseProblem(f"the database cannot be used: {in_one_line(error)}") from error


def schema_problem(error: OutboxSchemaError) -> DatabaseProblem:
    """Return the failure for missing tables."""
    return DatabaseProblem(
        f"{error}. `eventkit outbox schema` prints the statements that make the tables"
    )


def in_one_line(error: BaseException) -> str:
    """Return the class and first line of an error, without the parameters of a statement."""
    original = getattr(error, "orig", None)  # SQLAlchemy's text has the parameters
    said = str(error if original is None else original).strip()
    first, *_ = said.splitlines() or [""]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def only(error: BaseException) -> BaseException:
    """Return the exception in groups of one."""
    exceptions: Sequence[BaseException] = getattr(error, "exceptions", ())
    return only(exceptions[0]) if len(exceptions) == 1 else error
