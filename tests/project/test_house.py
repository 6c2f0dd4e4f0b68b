"""The house keeps its measures: what a reader would stumble over grows back unseen otherwise."""

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import anyio
import pytest
from anyio.lowlevel import checkpoint
from starlette.types import Message, Receive, Scope, Send

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Exchange, lifespan_of, respond
from tests.witness import Number

PACKAGE = Path(__file__).parent.parent.parent / "eventkit"
FILES = sorted(PACKAGE.rglob("*.py"))
SHIPPED = [path for path in FILES if "testing" not in path.parts]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SHIPPED}


def code_lines(path: Path) -> int:
    """How many lines are neither blank nor comment."""
    lines = map(str.strip, path.read_text(encoding="utf-8").splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of its body, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0


def private_access(tree: ast.AST) -> list[str]:
    """Each look at a private attribute of something else than `self` and `cls`."""
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"})
        and not (isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super")
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_no_file_is_so_long_that_it_must_hold_two_ideas(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 650
    if "_core" in path.parts:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 550


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_rule_is_switched_off_for_a_whole_file(path: Path) -> None:
    assert "# ruff: noqa" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_module_is_imported_by_a_string_where_the_linter_does_not_see_it(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            assert "eventkit" not in ast.unparse(node)


def test_objects_keep_out_of_each_others_private_parts() -> None:
    found = [each for tree in TREES.values() for each in private_access(tree)]
    lines = sum(map(code_lines, SHIPPED))

    assert len(found) / lines < 10 / 1000, found


def test_a_function_reads_in_one_glance() -> None:
    lengths = sorted(length_of(each) for tree in TREES.values() for each in functions(tree))

    assert statistics.median(lengths) <= 8
    assert lengths[len(lengths) * 9 // 10] <= 24


def test_an_event_context_is_one_idea() -> None:
    tree = TREES[PACKAGE / "_core" / "context.py"]
    (context,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == "EventContext"
    ]

    assert context.end_lineno is not None
    assert context.end_lineno - context.lineno < 350
    methods = [
        each for each in context.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(methods) <= 28


@pytest.mark.anyio
async def test_the_way_of_an_event_that_waits_behind_the_response_crosses_few_files(
    anyio_backend_name: str,
) -> None:
    files: list[str] = []
    bus, ended = EventBus(debug=False), anyio.Event()

    def note(frame: FrameType, what: str, _: object) -> None:
        file = frame.f_code.co_filename
        if what == "call" and str(PACKAGE) in file and files[-1:] != [file]:
            files.append(file)

    @bus.on(Number)
    async def handler(event: Number) -> None:
        await checkpoint()
        sys.setprofile(profiling)
        ended.set()

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        if bus.stats.handled:  # what is looked up once, is
            sys.setprofile(note)
        bus.publish(Number(1))
        await respond(send)

    async def receive() -> Message:
        raise NotImplementedError

    async def send(message: Message) -> None:
        """As a server whose buffers have room."""

    app = EventContextMiddleware(serve, bus)
    profiling = sys.getprofile()
    async with lifespan_of(app):
        for _ in range(2):
            ended = anyio.Event()
            await app(Exchange(method="POST", spec_version="2.3").scope, receive, send)
            await ended.wait()
            await anyio.wait_all_tasks_blocked()

    shown = [Path(file).relative_to(PACKAGE).as_posix() for file in files]
    assert shown
    # On trio each unit has a nursery, whose task is one more.
    assert len(shown) - 1 <= {"asyncio": 24, "trio": 26}[anyio_backend_name], shown
