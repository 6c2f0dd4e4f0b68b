"""Units of work keep the contract, whatever runs its tests; and it notices who does not keep it."""

import traceback
import unittest
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from dataclasses import replace

import anyio
import pytest
import trio
from trio.testing import MockClock

from eventkit._core import endings
from eventkit._core.awaited import run_all
from eventkit._core.dispatch import Terms, Turn
from eventkit._core.stats import Outcome
from eventkit._core.units import Unit
from tests.contract import (
    BusContract,
    CancellationContract,
    ContextContract,
    CounterContract,
    DispatchContract,
    FailureContract,
    NestingContract,
    OrderContract,
    TimeoutContract,
)
from tests.witness import ignore

NextTurn = Callable[[], Turn | None]
RunAll = Callable[[NextTurn, Terms], Awaitable[int]]


@pytest.mark.anyio
class TestUnitsOfWork(ContextContract, NestingContract):
    """As they are made by `EventBus`."""


def test_unittest_runs_the_contract_as_well() -> None:
    class TestNesting(NestingContract, unittest.IsolatedAsyncioTestCase):
        pass

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(TestNesting).run(result)

    assert result.testsRun == len([name for name in dir(TestNesting) if name.startswith("test_")])
    assert (result.errors, result.failures) == ([], [])


def test_a_bus_has_to_be_at_rest_when_its_test_has_ended() -> None:
    suite = BusContract()
    bus, _ = suite.watched_bus()

    with bus.context() as unit:
        unit.publish("a")
        with pytest.raises(AssertionError, match="not at rest"):
            suite.teardown_method()
        unit.discard()
    suite.teardown_method()


# Who breaks the contract


def changed(change: Callable[[Turn], Turn], next_turn: NextTurn) -> NextTurn:
    """Have each event changed before it is delivered."""

    def next_changed() -> Turn | None:
        turn = next_turn()
        return None if turn is None else change(turn)

    return next_changed


async def one_after_the_other(next_turn: NextTurn, terms: Terms) -> int:
    return await run_all(next_turn, replace(terms, sequential=True))


async def the_last_one_first(next_turn: NextTurn, terms: Terms) -> int:
    return await run_all(changed(backwards, next_turn), terms)


def backwards(turn: Turn) -> Turn:
    turn.indexes = turn.indexes[::-1]
    return turn


async def in_a_task_that_nobody_waits_for(next_turn: NextTurn, terms: Terms) -> int:
    while (turn := next_turn()) is not None:
        trio.lowlevel.spawn_system_task(run_all, iter([turn, None]).__next__, terms)
    return 0


async def in_variables_of_its_own(next_turn: NextTurn, terms: Terms) -> int:
    return await run_all(changed(with_other_variables, next_turn), terms)


def with_other_variables(turn: Turn) -> Turn:
    turn.variables = copy_context()
    return turn


async def as_long_as_it_takes(next_turn: NextTurn, terms: Terms) -> int:
    return await run_all(changed(without_timeouts, next_turn), replace(terms, timeout=None))


def without_timeouts(turn: Turn) -> Turn:
    turn.handlers = [replace(handler, timeout=None) for handler in turn.handlers]
    turn.alike = False
    return turn


async def deaf_to_cancellation(next_turn: NextTurn, terms: Terms) -> int:
    with anyio.move_on_after(60, shield=True):
        return await run_all(next_turn, terms)
    return 0


async def silent_about_failures(next_turn: NextTurn, terms: Terms) -> int:
    return await run_all(next_turn, replace(terms, report=ignore))


async def silent_about_interrupts(next_turn: NextTurn, terms: Terms) -> int:
    try:
        return await run_all(next_turn, terms)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        return 0


async def counting_twice(next_turn: NextTurn, terms: Terms) -> int:
    handled = await run_all(next_turn, terms)
    terms.tally.end(Outcome.HANDLED, 1)
    return handled


Broken = tuple[type[BusContract], str, str]  # a part of the contract, its test, what that says

BROKEN_DISPATCH: dict[RunAll, Broken] = {
    one_after_the_other: (
        DispatchContract,
        "test_a_handler_may_wait_for_a_sibling_whichever_was_subscribed_first",
        "TooSlowError",
    ),
    the_last_one_first: (
        DispatchContract,
        "test_handlers_start_in_the_order_of_subscription",
        "with False",
    ),
    in_a_task_that_nobody_waits_for: (
        OrderContract,
        "test_the_next_event_starts_when_all_handlers_of_the_one_before_have_ended",
        "assert steps == ",
    ),
    in_variables_of_its_own: (
        DispatchContract,
        "test_a_delivery_sees_the_context_variables_as_of_its_publish",
        "assert seen == ",
    ),
    as_long_as_it_takes: (
        TimeoutContract,
        "test_a_handler_past_its_time_is_cancelled_and_its_siblings_are_not",
        "TooSlowError",
    ),
    deaf_to_cancellation: (
        CancellationContract,
        "test_under_a_cancellation_already_in_effect_no_handler_starts",
        "assert started == []",
    ),
    silent_about_failures: (
        FailureContract,
        "test_parts_of_a_dispatch_error_are_dispatch_errors",
        "no DispatchError was raised",
    ),
    silent_about_interrupts: (
        FailureContract,
        "test_what_ends_the_process_leaves_follow_ups_undelivered",
        "no SystemExit was raised",
    ),
    counting_twice: (
        CounterContract,
        "test_whatever_tree_of_events_grows_all_of_it_is_accounted_for",
        "assert Expected(",
    ),
}


def no_unit(unit: Unit) -> None:
    """Find nobody to hand over to, or do nothing."""


BROKEN_UNITS: dict[str, tuple[object, Broken]] = {
    "discard": (
        Unit.release,
        (
            ContextContract,
            "test_what_was_discarded_is_not_delivered_although_the_unit_succeeds",
            "assert seen == ",
        ),
    ),
    "_receiver": (
        no_unit,
        (
            NestingContract,
            "test_a_nested_unit_hands_over_and_delivers_nothing_itself",
            "assert seen == []",
        ),
    ),
    "abandon": (
        no_unit,
        (
            ContextContract,
            "test_cancelled_in_the_final_drain_what_is_left_is_undelivered",
            "assert seen == ",
        ),
    ),
}


def verdict(suite: type[BusContract], test: str) -> str:
    """What a test of the contract fails with, where nobody waits longer than an hour.

    By trio's own means: with old releases of AnyIO its virtual clock does not jump to a deadline.
    """

    async def judge() -> None:
        running = suite()
        with trio.fail_after(3600):
            await getattr(running, test)()
        running.teardown_method()

    try:
        trio.run(judge, clock=MockClock(autojump_threshold=0))
    except Exception as error:
        return "".join(traceback.format_exception(error))
    return ""


@pytest.mark.parametrize("broken", BROKEN_DISPATCH)
def test_the_contract_notices_a_dispatch_that_breaks_it(
    broken: RunAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, test, words = BROKEN_DISPATCH[broken]
    assert verdict(suite, test) == ""

    monkeypatch.setattr(endings, "run_all", broken)

    assert words in verdict(suite, test)


@pytest.mark.parametrize("method", BROKEN_UNITS)
def test_the_contract_notices_units_of_work_that_break_it(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, (suite, test, words) = BROKEN_UNITS[method]
    assert verdict(suite, test) == ""

    monkeypatch.setattr(Unit, method, broken)

    assert words in verdict(suite, test)
