"""The texts in the source of the package, which pages quote: lines of the log and of errors."""

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from eventkit._core.stats import Outcome
from tests.serving import ROOT


@cache
def texts(*parts: str) -> list[str]:
    """All texts of the source except docstrings; each part of an f-string is a text of its own.

    Args:
        parts: The modules and folders of the package to look into; all of them, if none is given.
    """
    paths = [ROOT / "eventkit" / part for part in parts or ("",)]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
    trees = [ast.parse(file.read_text()) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings
    ] + [f"deliveries {outcome.value}" for outcome in Outcome]  # as the log composes them


def unsaid(messages: Iterable[str], *by: str) -> list[str]:
    """The pieces of messages that no text of the source has; `...` stands between pieces.

    Args:
        messages: What a page quotes.
        by: The modules and folders of the package to look into, as for `texts`.
    """
    pieces = [piece.strip() for message in messages for piece in message.split("...")]
    return [each for each in pieces if each and not any(each in text for text in texts(*by))]


def lines_of_log(page: Path) -> list[str]:
    """The lines that a page has in its tables of the log, without the `: ...` at their end."""
    rows = re.findall(
        r"^\| (?:INFO|WARNING|ERROR)[^|]* \| (.*?) \|", page.read_text(), re.MULTILINE
    )
    lines = [line for cell in rows for line in cell.split("`")[1::2]]
    return [line.removesuffix("...").rstrip(" :") for line in lines]
