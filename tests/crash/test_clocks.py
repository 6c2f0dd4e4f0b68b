"""Processes whose clock on the wall jumps: leases do not follow it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import require
from tests.crash.conftest import Place
from tests.crash.processes import Process
from tests.crash.test_leases import LONG_LEASE, finish, reaped

HOUR = 3600


@pytest.fixture
def jumping(place: Place, tmp_path: Path) -> Callable[..., tuple[Process, Callable[[int], None]]]:
    """Start a worker whose wall clock can be set, by so many seconds beside the true time."""
    found = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    if not found:
        require("libfaketime is not installed")

    def start(*options: str) -> tuple[Process, Callable[[int], None]]:
        file = tmp_path / f"clock{len(place.workers.all)}"

        def jump(seconds: int) -> None:
            written = file.with_suffix(".new")
            written.write_text(f"{seconds:+d}s")
            written.rename(file)

        jump(0)
        env = {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }
        return place.workers.start(*options, env=env), jump

    return start


@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forwards", "backwards"])
def test_a_jump_of_a_processs_clock_changes_nothing(
    place: Place,
    jumping: Callable[..., tuple[Process, Callable[[int], None]]],
    seconds: int,
) -> None:
    (first, jump), other = jumping("--holds", *LONG_LEASE), place.start(*LONG_LEASE)
    other.hear("ready")
    first.tell("clock")
    before = first.hear("clock")
    first.tell("commit", id="one")
    first.hear("waits", 2)
    jump(seconds)
    first.tell("clock")
    after = first.hear("clock", 2)
    assert abs(after["wall"] - before["wall"] - seconds) < HOUR / 2
    assert 0 <= after["boot"] - before["boot"] < HOUR / 2

    first.tell("commit", id="two")  # published at an hour that is not
    first.hear("done", id="two")
    other.tell("commit", id="three")  # a heartbeat or two later
    other.hear("ends", 2)
    first.tell("go")
    finish(place, first, other)
    found = place.count()
    assert (found.business, found.missing, found.phantom) == (3, [], [])
    if not place.is_sqlite:  # whose clock is that of each process
        assert found.twice.total() == 0
        assert not reaped(first, other)
