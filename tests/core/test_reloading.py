"""Modules that run twice: reloaded, or imported under a second name."""

import importlib
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eventkit import DuplicateNameError, EventBus, EventRouter
from eventkit.testing import EventCapture

pytestmark = pytest.mark.anyio

HANDLERS = """
from functools import partial
from {shared} import Event, bus, decorated, seen


@bus.on(Event, thread=False)
def plain(event: Event) -> None:
    seen.append(f"{{__name__}} plain")


@bus.on(Event, name="mail", thread=False)
def named(event: Event) -> None:
    seen.append(f"{{__name__}} named")


@bus.on(Event)
@decorated
async def wrapped(event: Event) -> None:
    seen.append(f"{{__name__}} wrapped")


class Handles:
    def handle(self, event: Event) -> None:
        seen.append(f"{{__name__}} method")


def wire() -> None:
    @bus.on(Event, thread=False)
    def inner(event: Event) -> None:
        seen.append(f"{{__name__}} inner")


def note(text: str, event: Event) -> None:
    seen.append(f"{{__name__}} {{text}}")


bus.subscribe(Event, Handles().handle, thread=False)
wire()
bus.subscribe(Event, lambda event: seen.append(f"{{__name__}} lambda"), thread=False)
for text in ("one", "two"):
    bus.subscribe(Event, partial(note, text), thread=False)
"""
KINDS = ["plain", "named", "wrapped", "method", "inner", "lambda", "one", "two"]

SHARED = """
from functools import wraps
from eventkit import EventBus

bus, seen = EventBus(), []


class Event: ...


def decorated(function):
    @wraps(function)
    async def wrapper(event):
        await function(event)

    return wrapper
"""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module with a bus, and beside it one with handlers, which nobody has imported."""
    (tmp_path / "shared_bus.py").write_text(SHARED)
    (tmp_path / "its_handlers.py").write_text(HANDLERS.format(shared="shared_bus"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    yield importlib.import_module("shared_bus")
    for name in ("shared_bus", "its_handlers", "other_name"):
        sys.modules.pop(name, None)


def imported_as(name: str, path: Path) -> ModuleType:
    """Run the module at this path under another name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def seen_by(shared: ModuleType) -> list[str]:
    shared.seen.clear()
    await shared.bus.dispatch(shared.Event())
    return list(shared.seen)


def facts_of(record: logging.LogRecord) -> dict[str, Any]:
    facts: dict[str, Any] = record.__dict__["eventkit"]
    return facts


async def test_a_module_that_is_imported_by_two_names_handles_each_event_once(
    shared: ModuleType, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    importlib.import_module("its_handlers")
    order = await seen_by(shared)
    imported_as("other_name", tmp_path / "its_handlers.py")

    assert order == [f"its_handlers {kind}" for kind in KINDS]
    assert sorted(await seen_by(shared)) == sorted(f"other_name {kind}" for kind in KINDS)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("a module has run twice, and its handlers were replaced")
    assert facts_of(record) == {
        "first_as": "its_handlers",
        "again_as": "other_name",
        "file": str(tmp_path / "its_handlers.py"),
    }


async def test_a_module_that_is_reloaded_handles_each_event_once_and_in_the_same_order(
    shared: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    module = importlib.import_module("its_handlers")
    before = [id(each.handler) for each in shared.bus.handlers_for(shared.Event)]
    importlib.reload(module)
    importlib.reload(module)

    assert await seen_by(shared) == [f"its_handlers {kind}" for kind in KINDS]
    now = [id(each.handler) for each in shared.bus.handlers_for(shared.Event)]
    assert not {*before} & {*now}
    [record] = caplog.records
    assert facts_of(record)["first_as"] == facts_of(record)["again_as"] == "its_handlers"


@pytest.mark.parametrize("script", ["main.py", "./main.py", "detour/../main.py", "link.py"])
def test_a_script_that_is_run_and_imported_mails_once(tmp_path: Path, script: str) -> None:
    """As `python main.py` does that ends in `uvicorn.run("main:app")`."""
    (tmp_path / "shared_bus.py").write_text(SHARED)
    (tmp_path / "main.py").write_text(
        HANDLERS.format(shared="shared_bus")
        + """
if __name__ == "__main__":
    import asyncio
    from importlib import import_module
    import_module("main")
    asyncio.run(bus.dispatch(Event()))
    print(*seen, sep="\\n")
"""
    )
    (tmp_path / "detour").mkdir()
    (tmp_path / "link.py").symlink_to("main.py")
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    assert sorted(run.stdout.splitlines()) == sorted(f"main {kind}" for kind in KINDS)
    [warning] = run.stderr.splitlines()
    assert "__main__" in warning
    assert "again_as=main" in warning


async def test_what_waits_while_its_module_is_reloaded_is_handled_by_the_new_functions(
    shared: ModuleType,
) -> None:
    module = importlib.import_module("its_handlers")
    async with shared.bus.context():
        shared.bus.publish(shared.Event())
        importlib.reload(module)
        importlib.reload(module)

    assert shared.seen == [f"its_handlers {kind}" for kind in KINDS]
    assert shared.bus.stats.discarded == 0


async def test_a_replaced_subscription_is_over_and_cancelling_it_changes_nothing(
    shared: ModuleType,
) -> None:
    module = importlib.import_module("its_handlers")
    replaced = shared.bus.handlers_for(shared.Event)
    importlib.reload(module)
    for subscription in replaced:
        assert not subscription.active
        subscription.cancel()

    assert await seen_by(shared) == [f"its_handlers {kind}" for kind in KINDS]


async def test_handlers_on_a_router_are_replaced_too_before_it_is_included(
    shared: ModuleType, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    bus, router = shared.bus, EventRouter()
    setattr(shared, "bus", router)  # noqa: B010 - checkers know of no such attribute
    source = HANDLERS.format(shared="shared_bus").replace("bus.subscribe(Event, ", "bus.on(Event)(")
    (tmp_path / "its_handlers.py").write_text(source.replace(", thread=False)\n", ")\n"))
    importlib.import_module("its_handlers")
    imported_as("other_name", tmp_path / "its_handlers.py")
    bus.include(router)
    await bus.dispatch(shared.Event())

    assert sorted(shared.seen) == sorted(f"other_name {kind}" for kind in KINDS)
    assert len(caplog.records) == 1


async def test_a_test_kit_that_restores_keeps_the_functions_of_the_last_import(
    shared: ModuleType,
) -> None:
    module = importlib.import_module("its_handlers")
    with EventCapture(shared.bus):
        importlib.reload(module)

    assert await seen_by(shared) == [f"its_handlers {kind}" for kind in KINDS]


async def test_closures_loops_and_lambdas_of_one_module_are_handlers_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus = EventBus()
    seen: list[str] = []

    def subscribe(name: str) -> None:
        def closure(event: int) -> None:
            seen.append(f"closure {name}")

        bus.subscribe(int, closure, thread=False)

    def made_lambda(name: str) -> Callable[[int], None]:
        return lambda event: seen.append(f"lambda {name}")

    for name in ("a", "b"):
        subscribe(name)
        bus.subscribe(int, made_lambda(name), thread=False)
    # fmt: off
    bus.subscribe(int, lambda event: seen.append("one"), thread=False); bus.subscribe(int, lambda event: seen.append("other"), thread=False)  # noqa: E501, E702
    # fmt: on
    for number in (1, 2):
        namespace: dict[str, Any] = {"seen": seen, "number": number}
        exec("def made(event): seen.append(f'made {number}')", namespace)  # both in `<string>`
        bus.subscribe(int, namespace["made"], thread=False)
    await bus.dispatch(1)

    assert seen == [
        "closure a",
        "lambda a",
        "closure b",
        "lambda b",
        "one",
        "other",
        "made 1",
        "made 2",
    ]
    assert caplog.records == []


def test_a_name_is_refused_still_where_the_handlers_are_two_functions_of_one_module() -> None:
    bus = EventBus()

    def one(event: int) -> None: ...

    def other(event: int) -> None: ...

    bus.subscribe(int, one, name="mail")
    with pytest.raises(DuplicateNameError):
        bus.subscribe(int, other, name="mail")
