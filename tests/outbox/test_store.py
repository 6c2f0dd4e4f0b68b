"""What processes do with rows, on each database and through each driver."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from eventkit.outbox._insert import NewEvent, NewRow
from eventkit.outbox._store import Known, Look, State, Store
from tests.outbox.rows import EVENT_TYPE, KNOWN, LEASE, ME, OTHER, PUBLISHED, Database, placed

READY, LEASED, DEAD, UNREADABLE, SUSPECT = State


def statements_of(database: Database) -> list[str]:
    """What is executed from now on."""
    engine = database.engine
    seen: list[str] = []

    @event.listens_for(
        engine.sync_engine if isinstance(engine, AsyncEngine) else engine, "before_cursor_execute"
    )
    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "eventkit" in statement:
            seen.append(statement)

    return seen


# Writing


def test_rows_of_one_transaction_are_one_statement_and_leased_by_their_process(
    database: Database,
) -> None:
    seen = statements_of(database)

    ids = database.insert(placed("mail", "stock"), placed("bill"), owner=ME)

    assert len(seen) == 1
    assert database.rows() == dict.fromkeys(ids, (LEASED, 1, ME))


def test_rows_without_an_owner_wait_for_anyone(database: Database) -> None:
    ids = database.insert(placed("mail", "stock"))

    assert database.rows() == dict.fromkeys(ids, (READY, 0, None))


def test_a_row_with_a_key_waits_for_a_relay_even_if_its_process_runs_others(
    database: Database,
) -> None:
    rows = [NewRow(uuid4(), "mail", "a"), NewRow(uuid4(), "stock", None)]

    database.insert(NewEvent(uuid4(), EVENT_TYPE, "{}", None, 1, PUBLISHED, rows), owner=ME)

    assert database.rows() == {rows[0].id: (READY, 0, None), rows[1].id: (LEASED, 1, ME)}


def test_no_events_are_no_statement(database: Database) -> None:
    seen = statements_of(database)

    database.insert()

    assert seen == []


def test_all_that_an_event_has_comes_back_when_it_is_claimed(database: Database) -> None:
    payload = json.dumps({"text": "100 % :p ? $1 {x} \\ ' \" \u00e4 \U0001f600", "n": 2**70})
    row = NewRow(uuid4(), "mail", "k'1")
    stored = NewEvent(uuid4(), EVENT_TYPE, payload, '{"trace": "1"}', 3, PUBLISHED, [row])
    database.insert(stored)

    (claimed,) = database.claim()

    assert claimed.id == row.id
    assert type(claimed.id).__mro__[-2] is UUID
    assert claimed.event_id == stored.event_id
    assert (claimed.event_type, claimed.handler, claimed.key) == (EVENT_TYPE, "mail", "k'1")
    assert (claimed.payload, claimed.headers) == (payload, '{"trace": "1"}')
    assert (claimed.depth, claimed.published_at, claimed.attempt) == (3, PUBLISHED, 1)
    assert not claimed.suspect


def test_many_rows_are_several_statements_none_of_them_too_long(database: Database) -> None:
    seen = statements_of(database)
    events = [placed("mail", "stock", key=key) for key in [None, "a"] for _ in range(60)]

    ids = database.insert(*events, placed(*["bill"] * 150))

    assert len(seen) == 4
    assert set(database.rows()) == set(ids)


def test_texts_are_kept_for_a_bounded_number_of_shapes(sqlite: Database) -> None:
    for rows in range(1, 30):
        for keyed in range(rows + 1):
            event = placed(*["mail"] * rows)
            few = [row._replace(key="a" if n < keyed else None) for n, row in enumerate(event.rows)]
            with_keys = event._replace(rows=few)
            sqlite.insert(with_keys, with_keys._replace(rows=placed("mail").rows))

    texts = sqlite.store._insert._texts.cache_info()
    assert texts.misses > 256
    assert texts.currsize == texts.maxsize == 256


def test_a_transaction_that_is_rolled_back_leaves_no_row(database: Database) -> None:
    def fail(connection: Connection) -> None:
        database.store.insert(connection, [placed("mail")], ME)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        database.call(fail)

    assert database.rows() == {}


# Leases


def test_a_process_is_alive_by_the_clock_of_the_database(database: Database) -> None:
    database.do(database.store.beat, ME, LEASE)
    assert database.do(database.store.look, OTHER, KNOWN) == Look((), False)

    database.lapse(ME)
    assert database.do(database.store.look, OTHER, KNOWN) == Look((ME,), False)
    assert database.do(database.store.look, ME, KNOWN) == Look((), False)

    database.do(database.store.beat, ME, LEASE)
    assert database.do(database.store.look, OTHER, KNOWN) == Look((), False)


def test_a_lease_lasts_as_long_as_was_said(database: Database) -> None:
    def both(connection: Connection) -> None:
        database.store.beat(connection, ME, 1000.0)
        database.store.insert(connection, [placed("mail")], None)

    database.call(both)

    ((left,),) = database.sql(
        "select alive_until - due_at from {p}eventkit_process, {p}eventkit_outbox"
    )
    assert 990 < left <= 1000


def test_what_a_process_owns_are_its_leased_rows(database: Database) -> None:
    mine = database.insert(placed("mail", "stock"), owner=ME)
    database.insert(placed("mail"), owner=OTHER)
    database.plant()

    assert database.do(database.store.owned, ME) == set(mine)


def test_what_is_given_back_is_due_and_not_counted(database: Database) -> None:
    mine = database.insert(placed("mail", "stock"), owner=ME)
    theirs = database.insert(placed("mail"), owner=OTHER)

    assert database.do(database.store.give_back, ME, [mine[0], theirs[0], uuid4()]) == 1
    assert database.rows() == {
        mine[0]: (READY, 0, None),
        mine[1]: (LEASED, 1, ME),
        theirs[0]: (LEASED, 1, OTHER),
    }
    assert database.claimed(OTHER) == [mine[0]]


def test_an_attempt_is_never_less_than_none(database: Database) -> None:
    (id_,) = database.insert(placed("mail"), owner=ME)
    database.change(id_, "attempt = 0")

    database.do(database.store.give_back, ME, [id_])

    assert database.rows()[id_] == (READY, 0, None)


def test_a_process_that_ends_gives_back_all_it_has_and_is_gone(database: Database) -> None:
    ids = database.insert(placed("mail", "stock"), owner=ME)
    database.do(database.store.beat, ME, LEASE)

    assert database.do(database.store.farewell, ME, ()) == 2
    assert database.rows() == dict.fromkeys(ids, (READY, 0, None))
    assert database.processes() == set()
    assert database.do(database.store.farewell, ME, ()) == 0


def test_a_process_that_cannot_stop_a_handler_keeps_its_row_and_stays(database: Database) -> None:
    running, waiting = database.insert(placed("mail", "stock"), owner=ME)
    database.do(database.store.beat, ME, LEASE)

    assert database.do(database.store.farewell, ME, {running}) == 1
    assert database.rows() == {running: (LEASED, 1, ME), waiting: (READY, 0, None)}
    assert database.processes() == {ME}


# Ends of an attempt


def test_what_is_done_is_deleted_and_what_was_lost_is_not(database: Database) -> None:
    first, second, again = database.insert(placed("mail", "stock", "bill"), owner=ME)
    theirs = database.insert(placed("mail"), owner=OTHER)[0]
    database.change(again, "attempt = 3")
    gone = uuid4()

    done = [(first, 1), (second, 2), (again, 3), (theirs, 1), (gone, 1)]
    assert database.do(database.store.complete, ME, done) == {first, again}
    assert set(database.rows()) == {second, theirs}
    assert database.do(database.store.complete, ME, []) == set()


def test_a_row_that_was_given_to_another_process_cannot_be_completed(database: Database) -> None:
    (id_,) = database.insert(placed("mail"), owner=ME)
    database.do(database.store.give_back, ME, [id_])
    database.claim(OTHER)

    assert database.do(database.store.complete, ME, [(id_, 1)]) == set()
    assert database.rows() == {id_: (LEASED, 1, OTHER)}


def test_the_completion_and_the_effect_are_one_transaction(database: Database) -> None:
    (id_,) = database.insert(placed("mail"), owner=ME)

    def complete_and_fail(connection: Connection) -> None:
        assert database.store.complete(connection, ME, [(id_, 1)]) == {id_}
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        database.call(complete_and_fail)

    assert database.rows() == {id_: (LEASED, 1, ME)}


def test_a_failure_is_tried_again_when_it_is_due(database: Database) -> None:
    (id_,) = database.insert(placed("mail"), owner=ME)

    assert database.do(database.store.fail, ME, id_, 1, "KeyError at shop.py:3", 60.0)
    assert database.rows() == {id_: (READY, 1, None)}
    assert database.claimed() == []
    assert database.claimed(within=30.0) == []
    assert [(row.id, row.attempt) for row in database.claim(within=61.0)] == [(id_, 2)]
    assert database.sql("select error from {p}eventkit_outbox") == [("KeyError at shop.py:3",)]


def test_a_failure_without_another_time_is_dead(database: Database) -> None:
    (id_,) = database.insert(placed("mail"), owner=ME)

    assert database.do(database.store.fail, ME, id_, 1, "KeyError", None)
    database.all_due()

    assert database.rows() == {id_: (DEAD, 1, None)}
    assert database.claimed() == []
    assert database.do(database.store.look, ME, KNOWN) == Look((), False)


def test_what_cannot_be_decoded_waits_uncounted_for_ten_minutes(database: Database) -> None:
    (id_,) = database.insert(placed("mail"), owner=ME)

    assert database.do(database.store.unreadable, ME, id_, 1, "ValidationError")
    assert database.rows() == {id_: (UNREADABLE, 0, None)}
    database.change(id_, "due_at = due_at - 590")
    assert database.claimed() == []
    assert database.claimed(within=10_000.0) == []  # else it would be found again and again
    assert database.do(database.store.look, ME, KNOWN) == Look((), False)
    database.change(id_, "due_at = due_at - 11")
    assert database.claimed() == [id_]


def test_a_relay_that_starts_tries_unreadable_rows_that_it_knows(database: Database) -> None:
    ids = database.insert(placed("mail", "other"), owner=ME)
    for id_ in ids:
        database.do(database.store.unreadable, ME, id_, 1, "ValidationError")

    assert database.do(database.store.unreadable_due, KNOWN) == 1
    assert database.claimed() == [ids[0]]


@pytest.mark.parametrize(("owner", "attempt"), [(OTHER, 1), (ME, 2)])
def test_an_attempt_of_somebody_else_cannot_be_ended(
    database: Database, owner: str, attempt: int
) -> None:
    (id_,) = database.insert(placed("mail"), owner=ME)

    assert not database.do(database.store.fail, owner, id_, attempt, "KeyError", 1.0)
    assert not database.do(database.store.fail, owner, id_, attempt, "KeyError", None)
    assert not database.do(database.store.unreadable, owner, id_, attempt, "KeyError")
    assert database.rows() == {id_: (LEASED, 1, ME)}


# Claims


def test_a_look_is_one_statement_and_sees_what_a_claim_would_get(database: Database) -> None:
    seen = statements_of(database)
    assert database.do(database.store.look, ME, KNOWN) == Look((), False)
    assert len(seen) == 1

    id_ = database.plant()
    assert database.do(database.store.look, ME, KNOWN) == Look((), True)
    database.claim()
    assert database.do(database.store.look, ME, KNOWN) == Look((), False)
    database.do(database.store.fail, ME, id_, 1, "KeyError", 60.0)
    assert database.do(database.store.look, ME, KNOWN) == Look((), False)
    assert database.do(database.store.look, ME, KNOWN, 61.0) == Look((), True)


def test_rows_are_claimed_in_the_order_in_which_they_are_due(database: Database) -> None:
    ids = [database.plant() for _ in range(6)]
    for place, id_ in enumerate(reversed(ids)):
        database.change(id_, f"due_at = {1000 + place}")

    assert database.claimed(limit=4) == ids[:1:-1]
    assert database.claimed(limit=4) == ids[1::-1]
    assert database.claimed(limit=4) == []


def test_a_claim_counts_and_names_its_owner(database: Database) -> None:
    id_ = database.plant()

    (claimed,) = database.claim()

    assert claimed.attempt == 1
    assert database.rows() == {id_: (LEASED, 1, ME)}


def test_busy_handlers_get_nothing(database: Database) -> None:
    mail, stock = database.insert(placed("mail", "stock"))

    assert database.claimed(busy={"mail"}) == [stock]
    assert database.claimed(busy=()) == [mail]


def test_what_is_unknown_here_is_not_touched_and_found_after_a_while(database: Database) -> None:
    ids = database.insert(
        placed("elsewhere"), placed("mail", "stock", event_type="shop.newer"), placed("mail")
    )
    unknown = database.store.unknown

    assert database.claimed() == [ids[3]]
    assert database.do(unknown, KNOWN) == []
    assert database.do(unknown, KNOWN, older_than=0.0) == [
        ("elsewhere", EVENT_TYPE, 1),
        ("mail", "shop.newer", 1),
        ("stock", "shop.newer", 1),
    ]
    database.all_due()
    assert len(database.do(unknown, KNOWN)) == 3
    assert database.do(database.store.look, ME, KNOWN) == Look((), False)

    newer = Known(("mail", "stock", "elsewhere"), ("shop.newer", EVENT_TYPE))
    assert database.do(unknown, newer) == []
    assert {row.id for row in database.do(database.store.claim, ME, newer, 9)} == set(ids[:3])


def test_a_process_that_knows_nothing_claims_nothing(database: Database) -> None:
    database.plant()

    assert database.do(database.store.claim, ME, Known((), ()), 9) == []
    assert not database.do(database.store.look, ME, Known((), ())).due


def test_an_empty_claim_is_no_error(database: Database) -> None:
    assert database.claimed() == []
    assert database.do(database.store.claim_suspect, ME, KNOWN) is None


# Keys


def test_deliveries_of_one_key_are_claimed_one_at_a_time_in_their_order(
    database: Database,
) -> None:
    ids = database.insert(placed("mail", key="a"), placed("mail", key="a"))
    ids.append(database.plant(key="a"))
    database.sql("update {p}eventkit_outbox set due_at = 1000 - position")  # not by due time

    for id_ in ids:
        assert database.claimed() == [id_]
        assert database.claimed(OTHER) == []
        database.do(database.store.complete, ME, [(id_, 1)])
    assert database.claimed() == []


def test_other_keys_and_other_handlers_are_not_held_up(database: Database) -> None:
    first = database.insert(placed("mail", "stock", key="a"), placed("mail", key="b"))
    free = database.insert(placed("mail", "mail"))
    database.insert(placed("mail", "stock", key="a"), placed("mail", key="b"))

    assert set(database.claimed()) == {*first, *free}


def test_a_failed_delivery_holds_up_its_key_until_it_is_done_or_dead(database: Database) -> None:
    first, second = database.plant(key="a"), database.plant(key="a")
    database.claim()
    database.do(database.store.fail, ME, first, 1, "KeyError", 60.0)

    assert database.claimed() == []
    assert [row.id for row in database.claim(within=61.0)] == [first]

    database.do(database.store.fail, ME, first, 2, "KeyError", None)
    assert database.claimed() == [second]


def test_an_unreadable_delivery_lets_the_next_through_but_never_beside_itself(
    database: Database,
) -> None:
    first, second = database.plant(key="a"), database.plant(key="a")
    database.claim()
    database.do(database.store.unreadable, ME, first, 1, "ValidationError")

    assert database.claimed() == [second]
    database.do(database.store.unreadable_due, KNOWN)
    assert database.claimed() == []
    database.do(database.store.complete, ME, [(second, 1)])
    assert database.claimed() == [first]


def test_a_suspect_delivery_holds_up_its_key(database: Database) -> None:
    first, second = database.plant(key="a"), database.plant(key="a")
    database.change(first, f"state = {SUSPECT:d}")

    assert database.claimed() == []
    suspect = database.do(database.store.claim_suspect, ME, KNOWN)
    assert suspect is not None
    assert suspect.id == first
    assert database.claimed() == []
    database.do(database.store.complete, ME, [(first, 1)])
    assert database.claimed() == [second]


# Death


def test_rows_of_a_dead_process_are_run_by_others(database: Database) -> None:
    once, again = database.insert(placed("mail", "stock"), owner=OTHER)
    database.change(again, "attempt = 2")
    (mine,) = database.insert(placed("mail"), owner=ME)
    for owner in (ME, OTHER):
        database.do(database.store.beat, owner, LEASE)
    database.lapse(OTHER)

    assert database.do(database.store.reap, ME, [OTHER]) == 2
    assert database.rows() == {
        once: (READY, 1, None),
        again: (SUSPECT, 2, None),
        mine: (LEASED, 1, ME),
    }
    assert database.processes() == {ME}
    assert [(row.id, row.attempt) for row in database.claim()] == [(once, 2)]


def test_suspects_are_claimed_alone(database: Database) -> None:
    ids = database.insert(placed("mail", "stock", "elsewhere"), owner=OTHER)
    for id_ in ids:
        database.change(id_, "attempt = 2")
    database.do(database.store.reap_orphans)

    assert database.claimed() == []
    assert database.do(database.store.look, ME, KNOWN).due
    for attempt in (3, 3):
        claimed = database.do(database.store.claim_suspect, ME, KNOWN)
        assert claimed is not None
        assert claimed.suspect
        assert claimed.attempt == attempt
    assert database.do(database.store.claim_suspect, ME, KNOWN) is None
    assert not database.do(database.store.look, ME, KNOWN).due


def test_a_process_that_is_alive_is_not_reaped_whatever_was_seen_before(
    database: Database,
) -> None:
    ids = database.insert(placed("mail"), owner=OTHER)
    database.do(database.store.beat, OTHER, LEASE)

    assert database.do(database.store.reap, ME, [OTHER]) == 0
    assert database.do(database.store.reap, ME, ["nobody"]) == 0
    assert database.do(database.store.reap, ME, []) == 0
    assert database.rows() == {ids[0]: (LEASED, 1, OTHER)}


def test_a_relay_never_reaps_itself(database: Database) -> None:
    ids = database.insert(placed("mail"), owner=ME)
    database.do(database.store.beat, ME, LEASE)
    database.lapse(ME)

    assert database.do(database.store.reap, ME, [ME]) == 0
    assert database.rows() == {ids[0]: (LEASED, 1, ME)}


def test_a_dead_process_without_rows_is_forgotten(database: Database) -> None:
    database.do(database.store.beat, OTHER, LEASE)
    database.lapse(OTHER)

    assert database.do(database.store.reap, ME, [OTHER]) == 0
    assert database.processes() == set()


def test_rows_of_a_process_that_nobody_knows_are_run_by_others(database: Database) -> None:
    ids = database.insert(placed("mail"), owner=OTHER)
    mine = database.insert(placed("mail"), owner=ME)
    database.do(database.store.beat, ME, LEASE)

    assert database.do(database.store.reap_orphans) == 1
    assert database.rows() == {ids[0]: (READY, 1, None), mine[0]: (LEASED, 1, ME)}


def test_a_process_that_was_reaped_cannot_complete(database: Database) -> None:
    (id_,) = database.insert(placed("mail"), owner=OTHER)
    database.do(database.store.beat, OTHER, LEASE)
    database.lapse(OTHER)
    database.do(database.store.reap, ME, [OTHER])
    database.claim(ME)
    database.do(database.store.beat, OTHER, LEASE)

    assert database.do(database.store.complete, OTHER, [(id_, 1)]) == set()
    assert not database.do(database.store.fail, OTHER, id_, 1, "KeyError", 1.0)
    assert database.do(database.store.complete, ME, [(id_, 2)]) == {id_}


# Side by side, on PostgreSQL: each test names who holds what


def test_two_relays_that_claim_at_once_get_different_rows_in_the_order_of_keys(
    postgres: Database,
) -> None:
    free = postgres.insert(*(placed("mail", "stock") for _ in range(50)))
    keyed = {key: [postgres.plant(key=key) for _ in range(5)] for key in ("a", "b", "c")}
    start = threading.Barrier(2)
    order: dict[str, list[UUID]] = {key: [] for key in keyed}
    ran: list[UUID] = []

    def work(owner: str) -> None:
        start.wait()
        while set(ran) != {*free, *(id_ for ids in keyed.values() for id_ in ids)}:
            claimed = postgres.claim(owner, limit=7)
            for row in claimed:
                ran.append(row.id)
                if row.key is not None:
                    order[row.key].append(row.id)
            postgres.do(postgres.store.complete, owner, [(row.id, 1) for row in claimed])

    with ThreadPoolExecutor() as threads:
        for ended in [threads.submit(work, ME), threads.submit(work, OTHER)]:
            ended.result(60)

    assert len(ran) == len(set(ran))
    assert order == keyed
    assert postgres.rows() == {}


def test_a_claim_does_not_wait_for_rows_that_another_one_takes(postgres: Database) -> None:
    ids = [postgres.plant() for _ in range(4)]
    keyed = [postgres.plant("stock", key="a") for _ in range(2)]
    assert isinstance(postgres.engine, Engine)

    with postgres.engine.begin() as mine, postgres.engine.begin() as theirs:
        first = postgres.store.claim(mine, ME, KNOWN, 2)
        second = postgres.store.claim(theirs, OTHER, KNOWN, 9)

    assert [row.id for row in first] == ids[:2]
    assert {row.id for row in second} == {*ids[2:], keyed[0]}


def test_a_process_that_renews_meanwhile_is_not_reaped(postgres: Database) -> None:
    ids = postgres.insert(placed("mail"), owner=OTHER)
    postgres.do(postgres.store.beat, OTHER, LEASE)
    postgres.lapse(OTHER)
    assert isinstance(postgres.engine, Engine)

    with postgres.engine.begin() as renewing:
        postgres.store.beat(renewing, OTHER, LEASE)
        # Nobody else sees the renewal yet.
        assert postgres.do(postgres.store.look, ME, KNOWN).lapsed == (OTHER,)
        assert postgres.do(postgres.store.reap, ME, [OTHER]) == 0

    assert postgres.do(postgres.store.reap, ME, [OTHER]) == 0
    assert postgres.rows() == {ids[0]: (LEASED, 1, OTHER)}
    assert postgres.processes() == {OTHER}


def test_a_renewal_waits_for_who_reaps_and_then_counts_anew(postgres: Database) -> None:
    (id_,) = postgres.insert(placed("mail"), owner=OTHER)
    postgres.do(postgres.store.beat, OTHER, LEASE)
    postgres.lapse(OTHER)
    assert isinstance(postgres.engine, Engine)

    with ThreadPoolExecutor() as threads:
        with postgres.engine.begin() as reaping:
            assert postgres.store.reap(reaping, ME, [OTHER]) == 1
            renewal = threads.submit(postgres.do, postgres.store.beat, OTHER, LEASE)
        renewal.result(60)

    assert postgres.processes() == {OTHER}
    assert postgres.rows() == {id_: (READY, 1, None)}


def test_a_reaper_does_not_wait_for_a_completion_and_comes_again(postgres: Database) -> None:
    completed, left = postgres.insert(placed("mail", "stock"), owner=OTHER)
    postgres.do(postgres.store.beat, OTHER, LEASE)
    postgres.lapse(OTHER)
    assert isinstance(postgres.engine, Engine)

    with postgres.engine.connect() as completing:
        postgres.store.complete(completing, OTHER, [(completed, 1)])
        assert postgres.do(postgres.store.reap, ME, [OTHER]) == 1
        assert postgres.rows() == {completed: (LEASED, 1, OTHER), left: (READY, 1, None)}
        assert postgres.do(postgres.store.look, ME, KNOWN).lapsed == (OTHER,)
        completing.rollback()

    assert postgres.do(postgres.store.reap, ME, [OTHER]) == 1
    assert postgres.rows()[completed] == (READY, 1, None)
    assert postgres.processes() == set()


def test_positions_rise_with_the_order_of_writing_whoever_commits_first(
    postgres: Database,
) -> None:
    assert isinstance(postgres.engine, Engine)
    first, second = placed("mail", key="a"), placed("mail", key="a")

    with postgres.engine.connect() as early, postgres.engine.connect() as late:
        postgres.store.insert(early, [first], None)
        postgres.store.insert(late, [second], None)
        late.commit()
        early.commit()

    assert postgres.claimed() == [first.rows[0].id]


# Names


def test_neither_search_path_nor_translation_moves_a_row(postgres: Database) -> None:
    tenant = postgres.schema
    assert tenant is not None
    url = postgres.engine.url.update_query_dict({"options": f"-csearch_path={tenant}"})
    engine = create_engine(url, execution_options={"schema_translate_map": {None: "nowhere"}})
    store = Store(engine.dialect, None)
    with engine.begin() as connection:
        assert store.problem(connection) is None

    with engine.begin() as connection:
        connection.execute(text("set local search_path = pg_catalog"))
        store.insert(connection, [placed("mail")], ME)
        store.beat(connection, ME, LEASE)
        assert len(store.owned(connection, ME)) == 1
    engine.dispose()

    assert len(postgres.rows()) == 1
    assert postgres.processes() == {ME}


def test_a_store_that_nobody_has_asked_first_looks_where_its_tables_are(
    postgres: Database,
) -> None:
    url = postgres.engine.url.update_query_dict({"options": f"-csearch_path={postgres.schema}"})
    engine = create_engine(url)
    writing, reading = Store(engine.dialect, None), Store(engine.dialect, None)
    with engine.begin() as connection:
        writing.insert(connection, [placed("mail")], None)
    with engine.begin() as connection:
        assert len(reading.claim(connection, ME, KNOWN, 9)) == 1
    engine.dispose()

    assert len(postgres.rows()) == 1


def test_where_no_tables_are_the_database_says_so(postgres: Database) -> None:
    engine = create_engine(
        postgres.engine.url.update_query_dict({"options": "-csearch_path=nowhere"})
    )
    store = Store(engine.dialect, None)

    with engine.connect() as connection:
        with pytest.raises(DBAPIError, match='relation "eventkit_outbox" does not exist'):
            store.insert(connection, [placed("mail")], ME)
        connection.rollback()
        with pytest.raises(DBAPIError, match='relation "eventkit_outbox" does not exist'):
            store.claim(connection, ME, KNOWN, 9)
    engine.dispose()


def test_another_driver_than_the_stores_own_writes_in_its_own_style(database: Database) -> None:
    styles = {"sqlite": "aiosqlite", "postgresql": "asyncpg"}
    name = database.engine.dialect.name
    driver = pytest.importorskip(styles[name])
    url = make_url(f"{name}+{driver.__name__}://")
    store = Store(url.get_dialect()(), database.schema)

    database.do(store.insert, [placed("mail")], ME)

    assert len(database.rows()) == 1


# Plans


PARTIAL = "eventkit_outbox_due"


@pytest.fixture(scope="module")
def crowded(used_postgres: Database) -> Database:
    """A hundred thousand rows that are dead, leased, or due later, and ten that are due."""
    used_postgres.clear()
    used_postgres.sql(
        """
        insert into {p}eventkit_outbox (id, event_id, event_type, handler, position, payload,
            depth, published_at, state, attempt, due_at, owner)
        select gen_random_uuid(), gen_random_uuid(), 'shop.placed', 'mail', 0, '', 1, 0,
            case when n <= 10 then 0 when mod(n, 10) = 0 then 1 else 2 end, 1,
            case when n <= 10 then 0 else extract(epoch from now()) + n end, 'x'
        from generate_series(1, 100010) as n
        """
    )
    used_postgres.sql("analyze {p}eventkit_outbox")
    return used_postgres


@pytest.mark.parametrize(
    ("step", "arguments"),
    [
        ("look", (ME, KNOWN)),
        ("claim", (ME, KNOWN, 10)),
        ("claim_suspect", (ME, KNOWN)),
        ("unreadable_due", (KNOWN,)),
        ("unknown", (KNOWN,)),
    ],
)
def test_what_polls_finds_its_rows_by_the_partial_index(
    crowded: Database, step: str, arguments: tuple[Any, ...]
) -> None:
    assert isinstance(crowded.engine, Engine)
    seen: list[tuple[str, Any]] = []

    with crowded.engine.connect() as connection:

        @event.listens_for(connection, "before_cursor_execute")
        def note(connection: Any, cursor: Any, statement: str, values: Any, *_: Any) -> None:
            seen.append((statement, values))

        getattr(crowded.store, step)(connection, *arguments)
        ((statement, values),) = seen
        explained = connection.exec_driver_sql(f"explain {statement}", values)
        plan = "\n".join(line for (line,) in explained)
        connection.rollback()

    assert f"using {PARTIAL}" in plan or f"on {PARTIAL}" in plan, plan
    assert "Seq Scan on eventkit_outbox" not in plan, plan


def test_sqlite_finds_what_is_due_by_the_partial_index(sqlite: Database) -> None:
    seen: list[tuple[str, Any]] = []
    assert isinstance(sqlite.engine, Engine)

    with sqlite.engine.connect() as connection:

        @event.listens_for(connection, "before_cursor_execute")
        def note(connection: Any, cursor: Any, statement: str, values: Any, *_: Any) -> None:
            if statement.lstrip().startswith(("select", "with", "update")):
                seen.append((statement, values))

        sqlite.store.look(connection, ME, KNOWN)
        sqlite.store.claim(connection, ME, KNOWN, 10)
        sqlite.store.claim_suspect(connection, ME, KNOWN)
        sqlite.store.unreadable_due(connection, KNOWN)
        for statement, values in seen:
            rows = connection.exec_driver_sql(f"explain query plan {statement}", values)
            plan = "\n".join(str(row[3]) for row in rows)
            assert f"USING INDEX {PARTIAL} (due_at" in plan, plan
            assert "TEMP B-TREE" not in plan, plan
