"""Owns what an SQL statement does to its transaction, as far as its text says.

Knows no database: the key words are those of the standard and of common databases.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

_READING = re.compile(
    r"[\s(]*(?:SELECT|VALUES|TABLE|SHOW|SET|RESET|EXPLAIN|PRAGMA|DESCRIBE|LOCK|DECLARE|FETCH|CLOSE"
    # What controls transactions.
    r"|LISTEN|BEGIN|START|COMMIT|END|PREPARE\s+TRANSACTION|ROLLBACK|ABORT|SAVE|SAVEPOINT|RELEASE)\b",
    re.IGNORECASE,
)
_WITH = re.compile(r"[\s(]*WITH\b", re.IGNORECASE)
# A comment, a string literal, or a quoted name. Not `/*! */`: MySQL executes its contents.
_OPAQUE = re.compile(
    r"--[^\n]*|/\*(?!!).*?\*/"
    r"|\b[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|\$(\w*)\$.*?\$\1\$"
    r'|"(?:[^"]|"")*"|`[^`]*`',
    re.DOTALL,
)
_WRITING_PART = re.compile(r"[()]\s*(?:INSERT|REPLACE\s+INTO|UPDATE|DELETE|MERGE)\b", re.IGNORECASE)


_CACHED = 10_000  # characters; longer texts are bulk statements, which rarely come twice


class Step(Enum):
    """What a statement does to a savepoint."""

    BEGIN = "begin"
    KEEP = "keep"
    UNDO = "undo"


_SAVEPOINTS = {
    Step.BEGIN: r"\s*SAVE(?:POINT|\s+TRAN(?:SACTION)?)\s+(\S+)",
    Step.KEEP: r"\s*RELEASE\s+(?:SAVEPOINT\s+)?(\S+)",
    Step.UNDO: r"\s*ROLLBACK\s+(?:(?:WORK\s+|TRANSACTION\s+)?TO\s+(?:SAVEPOINT\s+)?"
    r"|TRAN(?:SACTION)?\s+)(\S+)",
}


class Effect(NamedTuple):
    """What a text of one or more statements does to its transaction.

    Attributes:
        writes: Whether it may change something.
        steps: What it does to savepoints, in order, each with the name of the savepoint.
    """

    writes: bool
    steps: tuple[tuple[Step, str], ...]


def effect_of(text: str) -> Effect:
    """Judge each statement between `;` by its first word; a WITH statement by its parts.

    It does not find three kinds of writes: a function in a SELECT, EXPLAIN ANALYZE, SELECT INTO.
    """
    return _judge.__wrapped__(text) if len(text) > _CACHED else _judge(text)


@lru_cache(1024)
def _judge(text: str) -> Effect:
    writes = False
    steps: list[tuple[Step, str]] = []
    for statement in _OPAQUE.sub(_visible, text).split(";"):
        if _WITH.match(statement) is not None:
            writes |= _WRITING_PART.search(statement) is not None
        elif _READING.match(statement) is None:
            writes |= bool(statement.strip())
        for step, pattern in _SAVEPOINTS.items():
            if (found := re.match(pattern, statement, re.IGNORECASE)) is not None:
                steps.append((step, found[1]))
                break
    return Effect(writes, tuple(steps))


def _visible(opaque: re.Match[str]) -> str:
    """Keep a quoted name, without its semicolons; replace everything else by a space."""
    return opaque[0].replace(";", "") if opaque[0][0] in '"`' else " "
