"""Owns what becomes of mistakes: one line on stderr, without a traceback, and the exit code."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from click import ClickException

from eventkit.exceptions import OutboxSchemaError

EXIT_CODES = """\b
Exit codes:
  0  done; for `relay`, told to end
  1  nothing was found of what was named, or something failed
  2  wrong usage: nothing was done
  3  the database: out of reach, or its tables are missing
"""


class Failure(ClickException):
    """Something failed, or was not found."""

    exit_code = 1


class Mistake(ClickException):
    """It was started in a way that cannot work."""

    exit_code = 2


class DatabaseProblem(ClickException):
    """The database is out of reach, or is not as it should be."""

    exit_code = 3


@contextmanager
def asking_the_database() -> Generator[None]:
    """What fails in the block is the database's fault, and is said in one line.

    Drivers have errors of their own, which not all are SQLAlchemy's or the system's.
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
    """What is said where tables are missing."""
    return DatabaseProblem(
        f"{error}. `eventkit outbox schema` prints the statements that make the tables"
    )


def in_one_line(error: BaseException) -> str:
    """The class of an error, and what it says first; never the parameters of a statement."""
    original = getattr(error, "orig", None)  # SQLAlchemy's text has the parameters
    said = str(error if original is None else original).strip()
    first, *_ = said.splitlines() or [""]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def only(error: BaseException) -> BaseException:
    """What a group of one exception stands for."""
    exceptions: Sequence[BaseException] = getattr(error, "exceptions", ())
    return only(exceptions[0]) if len(exceptions) == 1 else error
