"""What `eventkit outbox` shows of what is kept, and does to it."""

import json
import sqlite3
from datetime import datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from eventkit._cli import _commands, _show
from tests.cli.conftest import Shop
from tests.outbox.rows import Database, placed

OLD = 1_700_000_000.25  # when rows of tests are published
DELIVERY = {
    "id",
    "event_id",
    "event_type",
    "handler",
    "key",
    "state",
    "attempt",
    "due_at",
    "owner",
    "error",
    "published_at",
}


def dead(kept: Database, handler: str = "mail", error: str = "builtins.OSError at a.py:1") -> UUID:
    id_ = kept.plant(handler)
    kept.change(id_, f"state = 2, attempt = 3, error = '{error}'")
    return id_


def test_stats_count_by_state_and_handler(shop: Shop) -> None:
    dead(shop.kept)
    shop.kept.plant("mail")
    shop.kept.plant("gone")

    result = shop("stats")

    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert " ".join(lines[0]) == "handler ready leased unreadable dead unknown oldest due"
    assert [line[:6] for line in lines[1:]] == [
        ["gone", "1", "0", "0", "0", "1"],
        ["mail", "1", "0", "0", "1", "0"],
        ["all", "handlers", "2", "0", "0", "1"],
    ]
    assert result.stderr == "imported\n"


def test_stats_as_json_have_the_same_keys_for_all_and_for_each(shop: Shop) -> None:
    dead(shop.kept)

    document = json.loads(shop("stats", "--json").stdout)

    handlers = document.pop("handlers")
    counts = {"ready": 0, "leased": 0, "unreadable": 0, "dead": 1, "unknown": 0}
    assert document == {**counts, "oldest_due": None}
    assert handlers == {"mail": document}


def test_stats_of_an_app_are_those_of_its_outbox(shop: Shop) -> None:
    dead(shop.kept)

    assert json.loads(shop("stats", "--json", attr="app").stdout)["dead"] == 1


def test_a_list_has_the_dead_and_says_nothing_of_payloads(shop: Shop) -> None:
    id_ = dead(shop.kept)
    shop.kept.insert(placed("mail", payload='{"number": 4242}'))

    plain = shop("list")
    (document,) = json.loads(shop("list", "--json").stdout)

    heading, line = plain.stdout.splitlines()
    assert " ".join(heading.split()) == "delivery state attempt due handler event key error"
    assert line.startswith(f"{id_}  dead         3  ")
    assert line.endswith("mail     shop.placed       builtins.OSError at a.py:1")
    assert document.keys() == DELIVERY
    assert document["id"] == str(id_)
    assert datetime.fromisoformat(document["published_at"]).timestamp() == OLD
    assert "4242" not in plain.output + json.dumps(document)


def test_a_list_is_narrowed_by_state_handler_and_limit(shop: Shop) -> None:
    dead(shop.kept, "bill")
    for handler in ("mail", "mail", "bill"):
        shop.kept.plant(handler)

    def listed(*options: str) -> list[str]:
        found = json.loads(shop("list", "--json", *options).stdout)
        return sorted(f"{each['handler']} {each['state']}" for each in found)

    assert listed("--state", "all", "--handler", "bill") == ["bill dead", "bill ready"]
    assert listed("--state", "ready", "--handler", "mail", "--limit", "1") == ["mail ready"]
    assert shop("list", "--limit", "1").stderr.splitlines()[-1] == (
        "there may be more than 1: give a higher --limit"
    )
    none = shop("list", "--state", "unreadable")
    assert none.stderr.splitlines()[-1] == (
        "there are no unreadable deliveries; --state all lists the others"
    )


def test_on_a_terminal_of_80_columns_a_list_stacks_what_is_long(small_shop: Shop) -> None:
    handler = "shop.handlers.orders:reserve_in_the_warehouse_that_is_nearest_to_the_customer"
    id_ = dead(small_shop.kept, handler, "builtins.OSError at /srv/shop/handlers/orders.py:120")
    dead(small_shop.kept)

    lines = small_shop("list", terminal="dumb").stdout.splitlines()

    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["delivery", "state", "attempt", "due"]
    assert handler in "".join("".join(lines).split())
    assert any(str(id_) in line and "dead" in line for line in lines)


def test_control_characters_of_what_is_stored_do_not_reach_a_terminal(small_shop: Shop) -> None:
    (id_,) = small_shop.kept.insert(placed("mail", key="\x1b[2Jkey", payload="{\x07}"))

    output = small_shop("list", "--state", "all", terminal="dumb").stdout
    output += small_shop("show", str(id_), "--payload").stdout

    assert "\\x1b[2Jkey" in output
    assert "\x1b" not in output
    assert "\x07" not in output


def test_one_delivery_is_shown_without_its_payload_unless_that_is_asked_for(shop: Shop) -> None:
    (id_,) = shop.kept.insert(placed("mail", payload='{"number": 4242}'))

    plain, full = shop("show", str(id_)), shop("show", str(id_), "--payload")
    document = json.loads(shop("show", str(id_), "--json").stdout)
    with_payload = json.loads(shop("show", str(id_), "--payload", "--json").stdout)

    assert f"id            {id_}" in plain.stdout.splitlines()
    assert "4242" not in plain.output
    assert 'payload       {"number": 4242}' in full.stdout.splitlines()
    assert document.keys() == DELIVERY
    assert with_payload == {**document, "payload": '{"number": 4242}'}


def test_what_is_not_kept_cannot_be_shown(shop: Shop) -> None:
    id_ = uuid4()

    result = shop("show", str(id_))

    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"Error: there is no delivery {id_}: it has ended, or was dropped"
    )
    assert result.stdout == ""


def test_a_retry_says_how_many_and_has_them_ready(shop: Shop) -> None:
    first, second, other = dead(shop.kept), dead(shop.kept, "bill"), dead(shop.kept, "bill")

    by_id = shop("retry", str(first))
    by_handler = shop("retry", "--handler", "bill", "--json")

    assert by_id.stdout == "retried 1\n"
    assert json.loads(by_handler.stdout) == {"retried": 2}
    assert shop.kept.rows() == dict.fromkeys([first, second, other], (0, 0, None))


def test_a_retry_of_what_is_not_dead_says_so(shop: Shop) -> None:
    ready = shop.kept.plant()

    result = shop("retry", str(ready), str(dead(shop.kept)))

    assert result.exit_code == 1
    assert result.stdout == "retried 1\n"
    assert result.stderr.splitlines()[-1] == (
        "Error: 1 of the given deliveries: not dead or unreadable, or no longer stored"
    )


@pytest.mark.parametrize("operation", ["retry", "drop"])
def test_who_does_not_say_which_ones_is_told_how(small_shop: Shop, operation: str) -> None:
    result = small_shop(operation)

    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: {operation} which deliveries? Give IDs, --handler or --before. --before 0s "
        "means all\n"
    )


@pytest.mark.parametrize(
    ("age", "matches"),
    [("0s", True), ("90m", True), ("1.5h", True), ("3d", True), ("2w", True), ("9999w", False)],
)
def test_an_age_is_a_number_and_a_unit(small_shop: Shop, age: str, matches: bool) -> None:
    dead(small_shop.kept)

    result = small_shop("retry", "--before", age)

    assert result.exit_code == 0
    assert result.stdout == f"retried {int(matches)}\n"


@pytest.mark.parametrize("age", ["30", "d", "1y", "-1d", "1d2h", ""])
def test_another_age_is_refused_with_an_example(small_shop: Shop, age: str) -> None:
    result = small_shop("drop", "--before", age)

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"Error: Invalid value for '--before': '{age}' is no age: give a number and a unit "
        "(s, m, h, d or w), such as 30d"
    )


def test_a_drop_asks_nobody_where_there_is_no_terminal(small_shop: Shop) -> None:
    dead(small_shop.kept)

    result = small_shop("drop", "--before", "30d")

    assert result.exit_code == 2
    assert result.stderr == (
        "Error: drop asks before it deletes, and there is no terminal: give --yes\n"
    )
    assert len(small_shop.kept.rows()) == 1


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, 1), ("n", 1, 4), ("", 1, 4)])
def test_a_drop_says_how_many_of_which_and_asks(
    small_shop: Shop, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: int
) -> None:
    monkeypatch.setattr(_commands, "_can_ask", lambda: True)
    for handler in ("mail", "mail", "bill"):
        dead(small_shop.kept, handler)
    small_shop.kept.change(small_shop.kept.plant(), "state = 1, owner = 'somebody'")

    result = small_shop("drop", "--before", "30d", answer=f"{answer}\n")

    assert result.exit_code == code
    _, *lines = result.stderr.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["handler", "state", "deliveries"],
        ["bill", "dead", "1"],
        ["mail", "dead", "2"],
    ]
    assert lines[3].startswith("Delete these 3 permanently? [y/N]:")
    assert result.stdout.endswith("dropped 3\n") is (code == 0)
    assert len(small_shop.kept.rows()) == left


def test_a_drop_with_yes_leaves_alone_what_runs_and_what_was_not_meant(shop: Shop) -> None:
    gone = dead(shop.kept)
    leased, ready = shop.kept.plant(), shop.kept.plant()
    shop.kept.change(leased, "state = 1, owner = 'somebody'")

    narrowed = shop("drop", "--handler", "mail", "--state", "dead", "--yes", "--json")
    rest = shop("drop", str(gone), str(leased), "--yes")

    assert json.loads(narrowed.stdout) == {"dropped": 1}
    assert {*shop.kept.rows()} == {leased, ready}
    assert rest.exit_code == 1
    assert rest.stdout == "dropped 0\n"
    assert rest.stderr.splitlines()[-1] == (
        "Error: 2 of the given deliveries: running, or no longer stored"
    )


def test_a_drop_of_a_state_names_it_in_what_it_could_not_drop(small_shop: Shop) -> None:
    ready = small_shop.kept.plant()

    result = small_shop("drop", str(ready), "--state", "dead", "--yes")

    assert result.stderr.splitlines()[-1] == (
        "Error: 1 of the given deliveries: not dead, or no longer stored"
    )


@pytest.mark.parametrize("operation", [("retry",), ("drop", "--yes")])
def test_much_has_a_bar_on_a_terminal(
    small_shop: Shop, monkeypatch: pytest.MonkeyPatch, operation: tuple[str, ...]
) -> None:
    monkeypatch.setattr(_show, "_MANY", 1)
    for _ in range(2):
        dead(small_shop.kept)

    command, *options = operation
    result = small_shop(command, "--before", "0s", *options, terminal="xterm")

    assert result.exit_code == 0
    assert "2/2" in result.stderr
    assert "2/2" not in result.stdout


def test_the_schema_makes_tables_that_the_command_works_with(place: Path, small_shop: Shop) -> None:
    small_shop.write((place / f"{small_shop.name}.py").read_text().replace("shop.db", "new.db"))

    before = small_shop("stats")
    statements = small_shop("schema").stdout
    assert json.loads(small_shop("schema", "--json").stdout) == {"schema": statements}
    database = sqlite3.connect(place / "new.db")
    database.executescript(statements)
    database.close()

    assert before.exit_code == 3
    line = before.stderr.splitlines()[-1]
    assert line.startswith("Error: there is no table eventkit_")
    assert line.endswith(
        " in schema 'main': add_tables(Base.metadata), then run your migrations or create_all. "
        "`eventkit outbox schema` prints the statements that make the tables"
    )
    assert small_shop("stats").exit_code == 0


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_database_that_is_away_is_said_in_one_line(
    place: Path, small_shop: Shop, driver: str
) -> None:
    pytest.importorskip(driver)
    source = (place / f"{small_shop.name}.py").read_text()
    url = f"postgresql+{driver}://somebody:secret@127.0.0.1:1/shop"
    source = source.replace(str(small_shop.kept.engine.url), url)
    if driver == "asyncpg":
        source = source.replace("engine = create_engine", "engine = create_async_engine")
    small_shop.write(source)

    result = small_shop("stats")

    assert result.exit_code == 3
    _, line = result.stderr.splitlines()
    assert line.startswith("Error: the database cannot be used: ")
    assert "secret" not in line
    assert result.stdout == ""


def test_nothing_is_kept_in_memory(place: Path, small_shop: Shop) -> None:
    source = (place / f"{small_shop.name}.py").read_text()
    small_shop.write(source.replace(str(small_shop.kept.engine.url), "sqlite://"))

    result = small_shop("stats")

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "Error: this outbox has SQLite in memory, which belongs to another process"
    )
