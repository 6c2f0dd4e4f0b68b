"""The picture of one request: what the demo draws, and the one that the README shows."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from examples.demo.cases import Shot
from examples.demo.neighbours import Mail, MailServer
from examples.demo.picture import picture
from examples.demo.trace import Run, Story
from tests.asgi import DEPENDENCIES_END_BEHIND_THE_RESPONSE
from tests.serving import ROOT

SVG = "{http://www.w3.org/2000/svg}"
MS = 1_000_000
MAIL, AUDIT = "users.send_welcome_mail", "audit.write_row"


@dataclass(frozen=True)
class Line:
    """One line of a picture: what stands left of it, and from where to where something is drawn."""

    kind: str
    left: float
    right: float


class Mailbox(MailServer):
    """What has arrived, without a server."""

    def __init__(self, *mails: Mail) -> None:
        self.mails = [*mails]


def read(svg: str) -> dict[str, Line | None]:
    """The lines of a picture by their labels; None where nothing is drawn."""
    lines: dict[str, Line | None] = {}
    label = ""
    for element in ElementTree.fromstring(svg):
        kind, x = element.get("class", ""), float(element.get("x", "0"))
        if element.tag == f"{SVG}text" and x < 100 and kind != "title":
            label = (element.text or "").strip()
            lines[label] = None
        elif element.tag == f"{SVG}rect" and kind != "paper":
            lines[label] = Line(kind, x, x + float(element.get("width", "0")))
        elif element.tag == f"{SVG}path" and kind not in ("grid", "sent-line"):
            at = float(re.findall(r"[\d.]+", element.get("d", ""))[0])
            lines[label] = Line(kind, at, at)
    return lines


def run(handler: str, *, at: int = 0, until: int = 0, outcome: str = "ok") -> Run:
    """An attempt, with its times in milliseconds."""
    ran = Run(handler, "UserCreated", handler, attempt=1, in_worker_thread=False)
    ran.started_ns, ran.ended_ns, ran.outcome = at * MS, until * MS, outcome
    return ran


def sign_up(*runs: Run, committed: int = 15) -> Shot:
    """A request that began at 10 ms, was answered at 14 ms, and had its mail at 80 ms."""
    mails = Mailbox(Mail("ada@example.com", "Welcome, Ada!", 80 * MS))
    story = Story(sent_ns=14 * MS, committed_ns=committed * MS, runs=[*runs])
    return Shot("ada", "POST /users", 201, 10 * MS, 16 * MS, story, mails)


def assert_in_order(lines: dict[str, Line | None]) -> None:
    """The response, the commit, the handlers, the mail: one after the other."""
    waits, sent = lines["the client waits"], lines["response sent"]
    committed, mailed = lines["transaction committed"], lines["mail received"]
    handlers = [lines[MAIL], lines[AUDIT]]
    assert waits
    assert sent
    assert committed
    assert mailed
    assert waits.left < sent.left < committed.left
    assert sent.left < waits.right
    for handler in handlers:
        assert handler
        assert handler.kind == "ok"
        assert committed.left < handler.left < handler.right
    assert handlers[0]
    assert handlers[0].left < mailed.left <= handlers[0].right


def test_the_lines_of_a_picture_are_those_of_the_request_in_order_of_time() -> None:
    lines = read(picture(sign_up(run(MAIL, at=20, until=81), run(AUDIT, at=21, until=30))))

    assert [*lines] == [
        "the client waits",
        "response sent",
        "transaction committed",
        "handlers of UserCreated",
        MAIL,
        AUDIT,
        "mail received",
    ]
    assert_in_order(lines)


def test_a_picture_says_in_words_what_it_shows() -> None:
    described = ElementTree.fromstring(picture(sign_up(run(MAIL, at=20, until=81))))

    assert described.findtext(f"{SVG}title") == "POST /users, from the request to the last handler"
    assert described.findtext(f"{SVG}desc") == (
        "Milliseconds since the request began: the client waits 0.0 to 6.0; response sent 4.0; "
        f"transaction committed 5.0; handlers of UserCreated; {MAIL} 10.0 to 71.0; "
        "mail received 70.0."
    )


def test_a_picture_shows_what_failed_and_what_did_not_run() -> None:
    failed = run(MAIL, at=20, until=40, outcome="failed")
    lines = read(picture(sign_up(failed, run("<audit>", outcome="discarded"), committed=0)))

    mail = lines[MAIL]
    assert mail
    assert mail.kind == "failed"
    assert lines["<audit>"] is lines["transaction rolled back"] is None


def test_the_picture_of_the_readme_shows_handlers_after_the_response_and_the_commit() -> None:
    svg = (ROOT / "docs/timeline.svg").read_text()

    assert_in_order(read(svg))
    assert len(svg) < 15_000
    assert "prefers-color-scheme: dark" in svg
    assert set(re.findall(r"https?://[^\s\"]+", svg)) == {SVG.strip("{}")}  # loads nothing


@pytest.mark.skipif(
    not DEPENDENCIES_END_BEHIND_THE_RESPONSE,
    reason="FastAPI 0.118 moved the exit of dependencies, and the commit, behind the response",
)
def test_the_demo_draws_the_picture_of_a_real_run(tmp_path: Path) -> None:
    pytest.importorskip("greenlet")  # compiled: a new Python may be without it
    path = tmp_path / "timeline.svg"

    subprocess.run([sys.executable, "-m", "examples.demo", "--svg", str(path)], check=True)

    assert_in_order(read(path.read_text()))
