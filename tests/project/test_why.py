"""What the page about the choice says of BackgroundTasks and of eventkit, side by side."""

import re
from types import ModuleType

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import JSONResponse
from starlette.testclient import TestClient

from tests.asgi import DEPENDENCIES_END_BEHIND_THE_RESPONSE
from tests.project.pages import DOCS, RunPage

WHY = DOCS / "why.md"

pytestmark = pytest.mark.skipif(
    not DEPENDENCIES_END_BEHIND_THE_RESPONSE,
    reason="FastAPI 0.118 moved the exit of dependencies behind the response",
)


@pytest.fixture
def page(run_page: RunPage) -> ModuleType:
    return run_page(WHY)


@pytest.mark.parametrize(
    ("path", "mails"),
    [("with-background-tasks", ["Welcome, Ada!"]), ("with-eventkit", [])],
)
def test_after_a_failed_commit_a_background_task_has_run_and_a_handler_has_not(
    page: ModuleType, path: str, mails: list[str]
) -> None:
    with TestClient(page.app, raise_server_exceptions=False) as client:
        assert client.post(f"/{path}/Ada").status_code == 200

    assert page.sent == mails
    assert page.bus.stats.discarded == (0 if mails else 1)


class Steps:
    """An application with background tasks, and what it does, in order."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.app = FastAPI()

        def transaction() -> object:
            yield
            self.taken.append("commit")

        @self.app.post("/{outcome}", dependencies=[Depends(transaction)])
        def endpoint(outcome: str, tasks: BackgroundTasks) -> object:
            tasks.add_task(self.work, outcome)
            tasks.add_task(self.taken.append, "second task")
            if outcome == "raised":
                raise HTTPException(409)
            return JSONResponse({}, 409) if outcome == "returned" else {}

    def work(self, outcome: str) -> None:
        if outcome == "fails":
            raise ValueError
        self.taken.append("task")

    def of(self, outcome: str) -> tuple[int, list[str]]:
        client = TestClient(self.app, raise_server_exceptions=False)
        return client.post(f"/{outcome}").status_code, self.taken


def test_background_tasks_run_before_the_exit_of_dependencies() -> None:
    assert Steps().of("fine") == (200, ["task", "second task", "commit"])


def test_a_background_task_that_raises_ends_the_later_ones_and_the_commit() -> None:
    assert Steps().of("fails") == (200, [])


def test_background_tasks_run_after_a_409_that_was_returned_and_not_after_one_that_was_raised() -> (
    None
):
    assert Steps().of("returned") == (409, ["task", "second task", "commit"])
    assert Steps().of("raised") == (409, [])


def test_the_table_of_tools_has_a_cell_for_each_tool_in_each_row() -> None:
    for table in re.findall(r"(?:^\|.*\|\n)+", WHY.read_text(), re.MULTILINE):
        assert len({line.count(" |") for line in table.splitlines()[2:]}) == 1
