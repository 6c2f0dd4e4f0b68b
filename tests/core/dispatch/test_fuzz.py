"""A few hundred random programs on each event loop; `python -m tests.fuzz` runs more of them."""

import gc
import json
import logging
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

from tests.fuzz.programs import Maker
from tests.fuzz.runs import run, sweep

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:coroutine '_AwaitedRun._help' was never awaited",
        "ignore::pytest.PytestUnraisableExceptionWarning",
    ),
    pytest.mark.skipif(
        tuple(map(int, version("anyio").split(".")[:2])) < (4, 12),
        reason="task groups of older releases of AnyIO hang, or leave requests to cancel behind",
    ),
]

SEEDS = {"uvloop": 50}  # where time is real


@pytest.fixture(params=["continuation-stealing"])
def implementation(request: pytest.FixtureRequest) -> str:
    """The programs choose it: this one, and the plain one beside it."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.CRITICAL + 1, "eventkit")
    yield
    gc.collect()  # which warns of what was never awaited, because its task was cancelled before


@pytest.fixture
def loop(anyio_backend: tuple[str, dict[str, Any]]) -> str:
    """The event loop's name, as the programs know it."""
    name, options = anyio_backend
    if "loop_factory" in options:
        return "asyncio-eager"
    return "uvloop" if options.get("use_uvloop") else name


def test_random_programs_keep_the_laws_of_dispatch(loop: str) -> None:
    for seed in range(SEEDS.get(loop, 150)):
        program = Maker(seed, loop).program()
        wrong, _ = run(program, loop)
        assert wrong == [], f"seed {seed}: {json.dumps(program)}"


@pytest.mark.parametrize("seed", [11, 29, 31, 53])
def test_a_random_program_keeps_them_wherever_it_is_cancelled(loop: str, seed: int) -> None:
    for program in sweep(Maker(seed, loop).program(), loop):
        wrong, _ = run(program, loop)
        assert wrong == [], json.dumps(program)
