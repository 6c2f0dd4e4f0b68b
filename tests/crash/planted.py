"""Faults that are planted in a copy of the package, and the tests that have to find them.

`python -m tests.crash.planted` runs all of those tests without a fault, then plants each by itself,
runs the tests that are named beside it, and prints a table; words choose the faults whose names
contain one of them. It ends non-zero where a test has passed in spite of its fault, or where a
fault cannot be planted any more.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COPIED = ["eventkit", "eventkit_pytest.py", "tests", "examples", "pyproject.toml"]

BROKEN = "tests/crash/test_broken.py"
KILLS = "tests/crash/test_kills.py"
LEASES = "tests/crash/test_leases.py"
RELAY = "tests/outbox/test_relay.py"
STORE = "tests/outbox/test_store.py"
UNIT = "tests/outbox/test_lease.py"
RECOVERY = (
    f"{KILLS}::test_what_was_committed_is_handled_by_another_process[pysqlite-in the handler]"
)
ANSWER_LOST = f"{BROKEN}::test_a_commit_that_raises_and_has_happened_is_handled_once"
STOPPED = f"{LEASES}::test_who_stands_still_for_longer_than_its_lease_has_lost_what_it_runs"
TOO_LATE = f"{LEASES}::test_a_completion_that_comes_too_late_takes_nothing_from_the_next_owner"


class Fault(NamedTuple):
    """An edit of one file, and who finds it.

    Attributes:
        name: What is wrong then.
        module: The file, below `eventkit/outbox`.
        old: What stands there now.
        new: What is to stand there.
        finders: Tests, by node id. Each has to fail.
    """

    name: str
    module: str
    old: str
    new: str
    finders: tuple[str, ...]


FAULTS = [
    Fault(
        "rows are not written before the commit",
        "_keeper.py",
        "leased=leased)\n            if not transaction.is_root:",
        "leased=leased) if False else None\n            if not transaction.is_root:",
        (
            f"{KILLS}::test_what_was_committed_is_handled_by_another_process"
            "[pysqlite-after the commit]",
        ),
    ),
    Fault(
        "rows are written in a transaction of their own",
        "_keeper.py",
        "        self._holdings.store.insert(connection, facts, owner)\n",
        "        self._holdings.database.call("
        "lambda own: self._holdings.store.insert(own, facts, owner))\n",
        (f"{KILLS}::test_what_was_not_committed_leaves_nothing[asyncpg-after the insert]",),
    ),
    Fault(
        "complete_with has no fence",
        "_keeper.py",
        "            if row.id not in done:\n",
        "            if False:\n",
        (f"{STOPPED}[pysqlite]",),
    ),
    Fault(
        "a completion has no fence",
        "_store.py",
        "id in :ids and attempt = :attempt and {_FENCED} returning id",
        "id in :ids and (attempt = :attempt or owner <> :owner or true) returning id",
        (
            f"{TOO_LATE}[pysqlite]",
            f"{STORE}::test_a_row_that_was_given_to_another_process_cannot_be_completed",
        ),
    ),
    Fault(
        "what nobody knows is not given back",
        "_lease.py",
        "count = self._store.give_back(connection, process.owner, twice) if twice else 0",
        "count = 0",
        (
            f"{ANSWER_LOST}[pysqlite-with a relay]",
            f"{UNIT}::test_a_row_that_nobody_knows_is_given_back_at_the_second_look",
        ),
    ),
    Fault(
        "what nobody knows is given back at the first look",
        "_lease.py",
        "if look - first >= self.seconds / 3]",
        "if look - first >= 0]",
        (f"{UNIT}::test_a_row_that_nobody_knows_is_given_back_at_the_second_look",),
    ),
    Fault(
        "the lease is not renewed",
        "_lease.py",
        "        if over.wait(pause):\n            return\n",
        "        over.wait()\n",
        # Across processes nobody would be reaped: no relay's own lease would be steady.
        (f"{UNIT}::test_the_thread_sends_heartbeats_and_tries_failed_ones_sooner",),
    ),
    Fault(
        "what was leased before a break of the lease runs",
        "_rows.py",
        " or row.term is not term",
        "",
        (f"{LEASES}::test_what_waited_behind_it_does_not_run_there_any_more[pysqlite]",),
    ),
    Fault(
        "rows run without a lease",
        "_rows.py",
        "if not row.leased or term is None or row.term is not term",
        "if not row.leased",
        (f"{LEASES}::test_what_waited_behind_it_does_not_run_there_any_more[pysqlite]",),
    ),
    Fault(
        "a relay reaps though its own lease is not steady",
        "_relay.py",
        "if not lapsed or not lease.steady:",
        "if not lapsed:",
        (
            f"{RELAY}::test_others_are_dead_only_for_who_was_alive_for_a_whole_lease_without_a_break",
            f"{LEASES}::test_while_the_database_is_away_nobody_is_taken_for_dead[asyncpg]",
        ),
    ),
    Fault(
        "no second look on SQLite",
        "_relay.py",
        "            lapsed &= seen\n",
        "",
        (f"{RELAY}::test_on_sqlite_who_waits_for_the_lock_is_not_dead",),
    ),
    Fault(
        "whether a process is dead is not looked at again",
        "_store.py",
        "where owner in :owners and alive_until < {now} {skip}",
        "where owner in :owners {skip}",
        (f"{STORE}::test_a_process_that_is_alive_is_not_reaped_whatever_was_seen_before",),
    ),
    Fault(
        "nobody is reaped",
        "_store.py",
        "        if not dead:\n            return 0\n",
        "        return 0\n",
        (RECOVERY,),
    ),
    Fault(
        "a claim does not look at the key",
        "_store.py",
        "and (e.state = 1 or e.position < r.position and (e.state in (0, 4)",
        "and false and (e.state = 1 or e.position < r.position and (e.state in (0, 4)",
        (f"{STORE}::test_deliveries_of_one_key_are_claimed_one_at_a_time_in_their_order",),
    ),
    Fault(
        "a claim does not count",
        "_store.py",
        "owner = :owner, attempt = attempt + 1",
        "owner = :owner",
        (f"{STORE}::test_a_claim_counts_and_names_its_owner",),
    ),
    Fault(
        "what kills its process is run beside others again",
        "_store.py",
        "case when attempt > 1 then 4 else 0 end",
        "0",
        (f"{STORE}::test_suspects_are_claimed_alone",),
    ),
    Fault(
        "a forked child is its parent",
        "_lease.py",
        "        pid = os.getpid()\n        process = self._processes.get(pid)\n        if",
        "        pid = os.getpid()\n"
        "        process = self._processes.get(pid) or next(iter(self._processes.values()), None)\n"
        "        if",
        (f"{BROKEN}::test_a_forked_child_has_an_owner_of_its_own[pysqlite-ends]",),
    ),
    Fault(
        "the last relay leaves without a farewell",
        "_holdings.py",
        "            given_back = await self.database.run(farewell)\n",
        "            given_back = 0 if farewell else 1\n",
        (f"{RELAY}::test_a_relay_of_its_own_gives_back_what_it_could_not_do_and_says_goodbye",),
    ),
]


def plant(fault: Fault, copy: Path) -> None:
    """Make the edit.

    Raises:
        ValueError: What it replaces is not there, once.
    """
    path = copy / "eventkit" / "outbox" / fault.module
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.module} has {text.count(fault.old)} times: {fault.old!r}")
    path.write_text(text.replace(fault.old, fault.new))


def run(finders: Iterable[str], copy: Path) -> int:
    """Run tests in the copy, up to the first that fails; pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *finders]
    env = os.environ | {"PYTHONPATH": str(copy), "EVENTKIT_CRASH_PATIENCE": "15"}
    return subprocess.run(
        command,
        cwd=copy,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    ).returncode


@contextmanager
def copied() -> Generator[Path]:
    """What the tests need, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="eventkit_planted_") as name:
        copy = Path(name)
        for each in COPIED:
            source = ROOT / each
            if source.is_dir():
                shutil.copytree(source, copy / each, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / each)
        yield copy


def verdict_on(fault: Fault, finder: str) -> str:
    with copied() as copy:
        try:
            plant(fault, copy)
        except ValueError as error:
            return f"CANNOT BE PLANTED: {error}"
        code = run([finder], copy)
        return VERDICTS.get(code, f"PYTEST ENDED WITH {code}")


VERDICTS = {0: "NOT FOUND", 1: "found", 5: "NO SUCH TEST", 4: "NO SUCH TEST"}


def main(words: list[str]) -> int:
    chosen = [each for each in FAULTS if not words or any(word in each.name for word in words)]
    with copied() as copy:
        if code := run({finder for fault in chosen for finder in fault.finders}, copy):
            print(f"without any fault pytest ends with {code}: first mend that")
            return code
    missed = 0
    for fault in chosen:
        for finder in fault.finders:
            begun = time.monotonic()
            verdict = verdict_on(fault, finder)
            missed += verdict != "found"
            took = time.monotonic() - begun
            print(f"{verdict:10} {took:4.0f} s  {fault.name:55} {finder}", flush=True)
    print(f"{missed} of {sum(len(each.finders) for each in chosen)} not found")
    return missed


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
