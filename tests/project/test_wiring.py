"""What the page about the wiring quotes: an answer of `explain`, and lines of the log."""

import importlib
import re
from pathlib import Path

from tests.project.messages import lines_of_log, unsaid
from tests.project.pages import DOCS, first_block

PAGE = DOCS / "wiring.md"


def test_explain_answers_as_the_page_has_it(project: Path) -> None:
    """Its first program is a module of its own here, as it is in the answer that it quotes."""
    answers = r"^```text\n(shop\.OrderPaid reaches .*?)^```"
    (quoted,) = re.findall(answers, PAGE.read_text(), re.M | re.S)
    (project / "shop.py").write_text(first_block(PAGE))
    shop = importlib.import_module("shop")

    answer = shop.bus.explain(shop.OrderPaid)

    assert answer.replace(str(project), "/app").strip() == quoted.strip()


def test_the_lines_that_the_page_has_of_the_log_are_written() -> None:
    lines = lines_of_log(PAGE)

    assert len(lines) > 18
    assert unsaid(lines) == []
