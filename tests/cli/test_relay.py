"""`eventkit relay`: what it runs, how it ends, and what it refuses."""

import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from eventkit import EventBus
from eventkit._cli import _relay
from eventkit.exceptions import OutboxSchemaError
from eventkit.outbox import Outbox
from eventkit.outbox._database import Database as Connections
from eventkit.outbox._outbox import holdings_of
from tests.cli.conftest import Shop

if sys.platform == "win32":
    pytest.skip("signals are other ones there", allow_module_level=True)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    before = [*logging.getLogger().handlers], logging.getLogger().level
    yield
    logging.getLogger().handlers[:] = before[0]
    logging.getLogger().setLevel(before[1])


def test_an_outbox_is_relayed_until_sigterm_whatever_its_module_says(shop: Shop) -> None:
    shop.kept.plant("mail")

    with shop.relaying("outbox") as relay:
        relay.wait_for("mailed 7 by a mailer of nobody's")
        code = relay.end()

    assert code == 0
    lines = [line.partition("INFO     eventkit: ")[2] for line in relay.output.splitlines()]
    address = shop.kept.engine.url.render_as_string()
    assert (
        f"the relay begins: bus=shop handlers=mail, bill, block, wait database={address}" in lines
    )
    assert "the relay has ended: bus=shop handled=1 failed=0 given_back=0" in lines
    assert shop.kept.rows() == {}
    assert shop.kept.processes() == set()


@pytest.mark.parametrize("loop", ["asyncio", "trio", "uvloop"])
def test_of_an_app_the_lifespan_is_run_and_handlers_get_what_is_its_own(
    small_shop: Shop, loop: str
) -> None:
    pytest.importorskip(loop)
    small_shop.kept.plant("mail")

    with small_shop.relaying("app", "--loop", loop) as relay:
        relay.wait_for("mailed 7 by the app's mailer")
        code = relay.end(signal.SIGINT)

    assert code == 0
    assert "the relay begins: bus=shop handlers=mail, bill, block, wait database=" in relay.output
    assert "app is down\n" in relay.output
    assert "signal=SIGINT" in relay.output
    assert small_shop.kept.processes() == set()


def test_a_second_signal_ends_it_at_once(small_shop: Shop) -> None:
    small_shop.kept.plant("block")

    with small_shop.relaying("outbox") as relay:
        relay.wait_for("blocked")
        relay.process.send_signal(signal.SIGTERM)
        relay.wait_for("delivering before shutdown")
        code = relay.end()

    assert code == -signal.SIGTERM
    assert len(small_shop.kept.processes()) == 1  # it lapses


@pytest.mark.parametrize("attr", ["outbox", "app"])
def test_what_does_not_end_in_time_is_given_back(small_shop: Shop, attr: str) -> None:
    id_ = small_shop.kept.plant("wait")

    with small_shop.relaying(attr, "--shutdown-timeout", "0.1") as relay:
        relay.wait_for("waiting")
        code = relay.end()

    assert code == 0
    assert "the relay has ended: bus=shop handled=0 failed=0 given_back=1" in relay.output
    assert small_shop.kept.rows() == {id_: (0, 0, None)}
    assert small_shop.kept.processes() == set()


@pytest.mark.parametrize("attr", ["outbox", "app"])
def test_what_cannot_be_stopped_is_left_behind(small_shop: Shop, attr: str) -> None:
    for _ in range(2):
        small_shop.kept.plant("block")

    options = ("--shutdown-timeout", "0.1", "--concurrency", "1")
    with small_shop.relaying(attr, *options) as relay:
        relay.wait_for("blocked")
        code = relay.end()

    assert code == 1
    assert relay.output.count("blocked") == 1
    assert "the process ends while handlers still run" in relay.output
    states = sorted(state for state, *_ in small_shop.kept.rows().values())
    assert states == [0, 1]  # the one that runs lapses with the process


def test_ctrl_c_ends_the_process_while_modules_are_imported(small_shop: Shop, place: Path) -> None:
    file = place / f"{small_shop.name}.py"
    file.write_text("import threading\nprint('importing', flush=True)\nthreading.Event().wait()\n")

    with small_shop.relaying("outbox") as relay:
        relay.wait_for("importing")
        code = relay.end(signal.SIGINT)

    assert code == -signal.SIGINT
    assert "Traceback" not in relay.output


@pytest.mark.parametrize("attr", ["outbox", "app"])
def test_missing_tables_are_a_matter_of_the_database(small_shop: Shop, attr: str) -> None:
    small_shop.kept.sql("drop table eventkit_process")

    result = small_shop.relay(attr)

    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1] == (
        "Error: there is no table eventkit_process in schema 'main': add_tables(Base.metadata), "
        "then run your migrations or create_all. `eventkit outbox schema` prints the statements "
        "that make the tables"
    )


@pytest.mark.parametrize("attr", ["outbox", "app"])
def test_a_relay_with_nothing_to_run_is_refused(small_shop: Shop, place: Path, attr: str) -> None:
    file = place / f"{small_shop.name}.py"
    file.write_text(
        file.read_text()
        .replace("durable=True", "durable=False")
        .replace("Durable(attempts=1)", "False")
    )

    result = small_shop.relay(attr)

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"Error: {small_shop.name}:{attr} has no durable handler, so there is nothing to run: name "
        "an outbox or an app in a module that includes the routers"
    )


def test_an_app_that_runs_no_relay_is_told_what_to_add(small_shop: Shop) -> None:
    small_shop.append("\nbare = FastAPI()\n")

    result = small_shop.relay("bare")

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"Error: {small_shop.name}:bare has started, and runs no relay: add the "
        "middleware with the bus of the outbox, app.add_middleware(EventContextMiddleware, bus=bus)"
    )


def test_an_app_that_does_not_start_is_shown_with_its_traceback(
    small_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    small_shop.append(
        "\nasync def broken(scope, receive, send):\n    raise LookupError('no settings')\n"
    )

    result = small_shop.relay("broken")

    assert result.exit_code == 1
    assert "LookupError: no settings" in caplog.text
    assert result.stderr.splitlines()[-1] == f"Error: {small_shop.name}:broken does not start"


def test_an_app_that_ends_without_a_word_does_not_start(small_shop: Shop) -> None:
    small_shop.append("\nasync def silent(scope, receive, send):\n    await receive()\n")

    result = small_shop.relay("silent")

    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"Error: {small_shop.name}:silent does not start"


def test_an_app_that_fails_later_has_failed(
    small_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    small_shop.append(
        "\nasync def fails(scope, receive, send):\n"
        "    async def up(message):\n"
        "        await send(message)\n"
        "        raise LookupError('gone')\n"
        "    await app(scope, receive, up)\n"
    )

    result = small_shop.relay("fails")

    assert result.exit_code == 1
    assert "LookupError: gone" in caplog.text
    assert result.stderr.splitlines()[-1] == f"Error: {small_shop.name}:fails has failed"


def test_an_app_that_is_wired_wrongly_is_told_so_in_one_line(small_shop: Shop) -> None:
    small_shop.append(
        "\nother = EventBus(name='other')\n"
        "other.subscribe(Placed, mail, durable=True)\n"
        "app.add_middleware(EventContextMiddleware, bus=other)\n"
    )

    result = small_shop.relay("app")

    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        f"Error: {small_shop.name}:app does not start: bus 'other' has durable handlers ("
    )


def test_sqlite_in_memory_cannot_be_relayed(small_shop: Shop, place: Path) -> None:
    file = place / f"{small_shop.name}.py"
    file.write_text(file.read_text().replace(str(small_shop.kept.engine.url), "sqlite://"))

    result = small_shop.relay("outbox")

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"Error: {small_shop.name}:outbox has SQLite in memory, which belongs to one "
        "process: a relay needs a database that it shares with the processes that publish"
    )


def test_a_loop_that_is_not_installed_is_refused(
    small_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing: dict[str, object] = {}
    monkeypatch.setattr(_relay, "find_spec", missing.get)

    result = small_shop.relay("outbox", "--loop", "uvloop")

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "Error: --loop uvloop needs uvloop, which is not installed: pip install uvloop"
    )


def test_an_engine_of_asyncios_is_refused_on_trio(small_shop: Shop, place: Path) -> None:
    pytest.importorskip("trio")
    pytest.importorskip("aiosqlite")
    file = place / f"{small_shop.name}.py"
    source = file.read_text().replace("engine = create_engine", "engine = create_async_engine")
    file.write_text(source.replace("sqlite:///", "sqlite+aiosqlite:///"))

    result = small_shop.relay("outbox", "--loop", "trio")

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "Error: an AsyncEngine works on asyncio only: leave out --loop trio, or give the outbox a "
        "blocking engine"
    )


@pytest.mark.parametrize("options", [("--concurrency", "0"), ("--shutdown-timeout", "0")])
def test_numbers_are_above_zero(small_shop: Shop, options: tuple[str, str]) -> None:
    assert small_shop.relay("outbox", *options).exit_code == 2


def test_who_has_set_up_logging_keeps_it(small_shop: Shop) -> None:
    small_shop.append("\nimport logging\nlogging.getLogger().addHandler(logging.NullHandler())\n")
    small_shop.append("\nasync def broken(scope, receive, send):\n    raise LookupError('no')\n")
    logging.getLogger().handlers.clear()

    assert "LookupError" not in small_shop.relay("broken").stderr


@pytest.mark.anyio
async def test_run_raises_what_is_missing_and_not_a_group_of_it(
    tmp_path: Path, anyio_backend_name: str
) -> None:
    with Outbox(
        EventBus(), create_engine(f"sqlite:///{tmp_path / 'empty.db'}"), relay=False
    ) as box:
        with pytest.raises(OutboxSchemaError, match="there is no table"):
            await box.run()

        assert holdings_of(box).relays
        assert not holdings_of(box).slows_down


def test_a_database_is_shown_without_its_password() -> None:
    pytest.importorskip("psycopg")
    engine = create_engine("postgresql+psycopg://anna:secret@db.example/shop?sslpassword=secret")

    assert Connections(engine).address == "postgresql+psycopg://anna:***@db.example/shop"
