"""What Python 3.14 and later can do that touches handlers and units of work."""

import asyncio
import subprocess
import sys
from functools import partial
from importlib import import_module
from typing import Any

import pytest
from anyio import Event, wait_all_tasks_blocked

from eventkit import DomainEvent, EventBus

pytestmark = pytest.mark.skipif(sys.version_info < (3, 14), reason="needs Python 3.14")


class Ping(DomainEvent):
    """Something happened."""


@pytest.mark.anyio
@pytest.mark.usefixtures("on_asyncio")
async def test_a_task_that_a_handler_waits_for_is_known_to_be_awaited_by_the_dispatch() -> None:
    bus = EventBus()
    released = Event()
    started: list[asyncio.Task[None]] = []

    async def handler(event: Ping) -> None:
        started.append(asyncio.create_task(released.wait()))
        await started[-1]

    bus.subscribe(Ping, handler)
    bus.subscribe(Ping, partial(handler))
    dispatching = asyncio.create_task(bus.dispatch(Ping()))
    await wait_all_tasks_blocked()

    awaiting = [awaiting_tasks(task) for task in started]
    released.set()
    await dispatching

    assert len(awaiting) == 2
    assert all(dispatching in tasks for tasks in awaiting)


def awaiting_tasks(task: asyncio.Task[None]) -> list[object]:
    """All tasks that await this one, and those that await them."""
    capture: Any = import_module("asyncio").capture_call_graph  # earlier versions have none

    def above(graph: Any) -> list[object]:
        return [graph.future, *(each for waiter in graph.awaited_by for each in above(waiter))]

    return above(capture(task))[1:]


IN_A_THREAD = """
import contextvars, sys, threading
import anyio
from eventkit import EventBus

bus = EventBus()
seen = []

@bus.on(str)
async def handler(event):
    seen.append((event, threading.current_thread() is threading.main_thread()))

def publish():
    bus.publish("from a thread")

def run_a_loop():
    async def dispatch():
        await bus.dispatch("from a loop")
    anyio.run(dispatch)

def in_thread(function, **options):
    thread = threading.Thread(target=function, **options)
    thread.start()
    thread.join()

async def main():
    async with bus.context():
        in_thread(publish)
        in_thread(run_a_loop, context=contextvars.Context())
        print(seen, bus.stats.pending)
    print(seen)

anyio.run(main, backend=sys.argv[1])
"""


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_thread_that_inherits_context_variables_publishes_into_the_unit_of_its_creator(
    loop: str,
) -> None:
    """As threads do on free-threaded builds. One with a loop of its own needs an empty context."""
    options = ["-X", "thread_inherit_context=1", "-c", IN_A_THREAD, loop]
    done = subprocess.run([sys.executable, *options], capture_output=True, check=True, text=True)

    assert done.stdout.splitlines() == [
        "[('from a loop', False)] 1",
        "[('from a loop', False), ('from a thread', True)]",
    ]


LAZY = """
lazy from typing import Annotated
lazy from fastapi import Depends
lazy from eventkit import EventBus
lazy from eventkit.fastapi import get_bus

async def handler(
    event: OnlyForTypeCheckers,
    bus: Annotated[EventBus, Depends(get_bus)],
    other: Annotated[OnlyForTypeCheckers, Depends(get_bus)],
) -> None:
    seen.extend([bus, other])
"""


@pytest.mark.anyio
@pytest.mark.skipif(sys.version_info < (3, 15), reason="needs Python 3.15")
async def test_what_a_handler_names_may_be_imported_lazily() -> None:
    bus = EventBus()
    seen: list[object] = []
    namespace: dict[str, Any] = {"__name__": "lazy", "seen": seen}  # as exec fills it
    exec(compile(LAZY, "lazy.py", "exec", dont_inherit=True), namespace)

    bus.subscribe(Ping, namespace["handler"])
    await bus.dispatch(Ping())

    assert seen == [bus, bus]
