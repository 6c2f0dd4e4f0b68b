"""The texts in the source of the package, which pages quote: lines of the log and of errors."""

import ast
from collections.abc import Iterable
from functools import cache

from eventkit._core.stats import Outcome
from tests.serving import ROOT


@cache
def texts() -> list[str]:
    """All texts of the source; the parts of an f-string are texts of their own."""
    return [
        node.value
        for file in (ROOT / "eventkit").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ] + [f"deliveries {outcome.value}" for outcome in Outcome]  # as the log composes them


def unsaid(messages: Iterable[str]) -> list[str]:
    """The parts of messages that no text of the source has; `...` stands between parts."""
    parts = [part.strip() for message in messages for part in message.split("...")]
    return [part for part in parts if part and not any(part in text for text in texts())]
