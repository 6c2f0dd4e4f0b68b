"""What people do with rows."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection

from eventkit.outbox._operations import Batch, OutboxStats
from eventkit.outbox._store import Known, State, in_batches
from tests.outbox.rows import EVENT_TYPE, KNOWN, ME, PUBLISHED, Database, placed

READY, LEASED, DEAD, UNREADABLE, SUSPECT = State


def one_of_each(database: Database, handler: str = "mail") -> dict[State, UUID]:
    """A row in each state."""
    ids = dict(zip(State, database.insert(*(placed(handler) for _ in State)), strict=True))
    for state, id_ in ids.items():
        database.change(id_, f"state = {state:d}, attempt = {10 + state}, error = 'KeyError'")
    database.change(ids[LEASED], "owner = 'host:1:me'")
    return ids


def dead(database: Database, count: int, handler: str = "mail") -> list[UUID]:
    ids = database.insert(*(placed(handler) for _ in range(count)))
    for id_ in ids:
        database.change(id_, "state = 2")
    return ids


def test_lists_show_the_rows_of_a_state_without_payloads(database: Database) -> None:
    ids = one_of_each(database)
    shown = {
        state: {row.id for row in database.do(database.store.deliveries, state)}
        for state in ("ready", "leased", "dead", "unreadable", None)
    }

    assert shown == {
        "ready": {ids[READY], ids[SUSPECT]},
        "leased": {ids[LEASED]},
        "dead": {ids[DEAD]},
        "unreadable": {ids[UNREADABLE]},
        None: set(ids.values()),
    }
    (row,) = database.do(database.store.deliveries)
    assert row.payload is None
    assert (row.handler, row.event_type, row.state) == ("mail", EVENT_TYPE, "dead")
    assert (row.attempt, row.owner, row.error, row.key) == (12, None, "KeyError", None)
    assert row.published_at == datetime.fromtimestamp(PUBLISHED, UTC)
    assert row.due_at.tzinfo is UTC
    assert abs(row.due_at - datetime.now(UTC)) < timedelta(hours=1)


def test_lists_are_filtered_ordered_and_bounded(database: Database) -> None:
    ids = dead(database, 5)
    dead(database, 3, "stock")
    for place, id_ in enumerate(reversed(ids)):
        database.change(id_, f"due_at = {1000 + place}")

    listed = database.do(database.store.deliveries, "dead", "mail", limit=3)

    assert [row.id for row in listed] == ids[:1:-1]
    with pytest.raises(ValueError, match="no state 'gone': use one of ready, leased, dead, unre"):
        database.do(database.store.deliveries, "gone")


def test_one_row_is_shown_with_its_payload(database: Database) -> None:
    event = placed("mail", key="a", payload='{"n": 1}')
    (id_,) = database.insert(event)

    row = database.do(database.store.get, id_)

    assert row is not None
    assert (row.id, row.event_id, row.key, row.payload) == (id_, event.event_id, "a", '{"n": 1}')
    assert '{"n": 1}' not in repr(row)
    assert database.do(database.store.get, uuid4()) is None


def test_a_retry_is_as_the_first_time_and_leaves_others_alone(database: Database) -> None:
    ids = one_of_each(database)

    assert database.do(database.store.retry, ids=ids.values()) == Batch(2, None)
    rows = database.rows()
    assert rows[ids[DEAD]] == rows[ids[UNREADABLE]] == (READY, 0, None)
    for state in (READY, LEASED, SUSPECT):
        assert rows[ids[state]][:2] == (state, 10 + state)
    row = database.do(database.store.get, ids[DEAD])
    assert row is not None
    assert row.error is None
    assert {ids[DEAD], ids[UNREADABLE]} <= set(database.claimed())


def test_a_drop_never_takes_what_is_leased(database: Database) -> None:
    ids = one_of_each(database)

    assert database.do(database.store.drop, handler="mail", state="leased").changed == 0
    assert database.do(database.store.drop, handler="mail", state="dead").changed == 1
    assert set(database.rows()) == set(ids.values()) - {ids[DEAD]}
    assert database.do(database.store.drop, handler="mail").changed == 3
    assert set(database.rows()) == {ids[LEASED]}
    assert database.do(database.store.drop, ids=[ids[LEASED]]).changed == 0


@pytest.mark.parametrize("operation", ["retry", "drop"])
def test_what_is_meant_has_to_be_said(database: Database, operation: str) -> None:
    change: Callable[..., Batch] = getattr(database.store, operation)
    mine, other = dead(database, 1)[0], dead(database, 1, "stock")[0]
    database.change(other, "published_at = published_at + 1000000000000")

    with pytest.raises(ValueError, match=f"{operation} which deliveries"):
        database.do(change)
    assert database.do(change, ids=()).changed == 0
    assert database.do(change, handler="bill").changed == 0
    assert database.do(change, ids=[mine], handler="stock").changed == 0
    assert database.do(change, handler="stock", before=60).changed == 0
    assert database.do(change, before=timedelta(days=100_000)).changed == 0
    assert database.do(change, before=timedelta(days=1)).changed == 1
    assert database.do(change, handler="stock").changed == 1


@pytest.mark.parametrize("operation", ["retry", "drop"])
@pytest.mark.parametrize("count", [0, 6, 7])
def test_many_rows_are_changed_in_batches_each_of_them_once(
    database: Database, operation: str, count: int
) -> None:
    ids = dead(database, count)
    step = partial(getattr(database.store, operation), handler="mail", limit=3)
    progress: list[int] = []

    async def run(function: Callable[[Connection], Batch]) -> Batch:
        batch = connect(function)
        for id_ in ids:  # dead again at once
            database.change(id_, "state = 2")
        return batch

    def connect(function: Callable[[Connection], Batch]) -> Batch:
        return database.call(function)

    def drive() -> int:
        working = in_batches(run, step, progress.append)
        try:
            working.send(None)
        except StopIteration as ended:
            total: int = ended.value
            return total
        raise AssertionError

    assert drive() == count
    assert progress == {0: [0], 6: [3, 6, 6], 7: [3, 6, 7]}[count]
    assert len(database.rows()) == (0 if operation == "drop" else count)


def test_batches_need_nobody_who_watches(sqlite: Database) -> None:
    dead(sqlite, 4)

    async def run(function: Callable[[Connection], Any]) -> Any:
        return sqlite.call(function)

    assert asyncio.run(in_batches(run, partial(sqlite.store.drop, handler="mail", limit=3))) == 4


def test_counts_are_by_state_and_by_handler(database: Database) -> None:
    one_of_each(database)
    one_of_each(database, "elsewhere")
    (later,) = database.insert(placed("mail"), owner=ME)
    database.do(database.store.fail, ME, later, 1, "KeyError", 1000.0)
    database.insert(placed("mail", event_type="shop.newer"), owner=ME)
    database.insert(placed("stock", event_type="shop.newer"))

    stats = database.do(database.store.stats, KNOWN)

    # Ready, suspect and unreadable of a handler that is elsewhere; one of a newer type.
    assert (stats.ready, stats.leased, stats.unreadable, stats.dead) == (6, 3, 2, 2)
    assert (stats.unknown, stats.lost) == (4, 0)
    assert stats.oldest_due is not None
    assert 0 <= stats.oldest_due < 600
    assert list(stats.handlers) == ["elsewhere", "mail", "stock"]
    mail = stats.handlers["mail"]
    assert (mail.ready, mail.leased, mail.unreadable, mail.dead, mail.unknown) == (3, 2, 1, 1, 0)
    assert stats.handlers["elsewhere"].unknown == 3
    assert stats.handlers["stock"].unknown == 1
    assert stats.handlers["stock"].handlers == {}


def test_an_empty_table_counts_nothing(database: Database) -> None:
    assert database.do(database.store.stats, Known((), ())) == OutboxStats()
