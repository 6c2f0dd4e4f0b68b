"""Each mistake in what is named is one line that says what to do, and exit code 2."""

import sys
from pathlib import Path
from uuid import uuid4

import pytest

from tests.cli.conftest import Shop
from tests.serving import run_python


def said(shop: Shop, attr: str, command: str = "stats") -> str:
    """The one line, with `shop` for the module's name."""
    result = shop(command, attr=attr)
    assert result.exit_code == 2
    assert result.stdout == ""
    *_, line = result.stderr.splitlines()
    assert "Traceback" not in result.stderr
    return line.replace(shop.name, "shop")


@pytest.mark.parametrize("name", ["shop", "shop:", ":outbox"])
def test_a_name_has_a_module_and_an_attribute(small_shop: Shop, name: str) -> None:
    result = small_shop.command("outbox", "stats", name)

    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: '{name}' is not of the form module:attr, such as shop.main:outbox\n"
    )


@pytest.mark.parametrize(
    ("name", "missing"),
    [("no_such", "no_such"), ("no_such.shop", "no_such"), ("os.shop", "os.shop")],
)
def test_a_module_that_is_missing_is_named(small_shop: Shop, name: str, missing: str) -> None:
    result = small_shop.command("outbox", "stats", f"{name}:outbox")

    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: there is no module '{missing}': give its dotted name, as in an import "
        "statement, and start the command in a directory where this import works\n"
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("import no_such_driver", "ModuleNotFoundError: No module named 'no_such_driver'"),
        ("raise ValueError('not\\nconfigured')", "ValueError: not"),
        ("raise SystemExit", "SystemExit"),
    ],
)
def test_a_module_that_fails_is_blamed_with_the_line(
    small_shop: Shop, place: Path, line: str, problem: str
) -> None:
    file = place / f"{small_shop.name}.py"
    file.write_text(f"\n{line}\n")

    shown = file.as_posix().replace(small_shop.name, "shop")
    assert said(small_shop, "outbox") == f"Error: shop cannot be imported: {problem} ({shown}:2)"


def test_an_attribute_that_is_missing_is_named_beside_those_that_would_do(
    small_shop: Shop, place: Path
) -> None:
    assert said(small_shop, "outbx") == "Error: shop has no 'outbx'; its outboxes: outbox"

    (place / f"{small_shop.name}.py").write_text("")
    assert said(small_shop, "outbox.inner") == "Error: shop has no 'outbox.inner'"


@pytest.mark.parametrize(
    ("attr", "kind"), [("bus", "EventBus"), ("get_mailer", "function"), ("Placed", "type")]
)
def test_what_is_neither_outbox_nor_app_is_said_to_be_what_it_is(
    small_shop: Shop, attr: str, kind: str
) -> None:
    assert said(small_shop, attr) == (
        f"Error: shop:{attr} is neither an Outbox nor an ASGI app, but of class {kind}: name the "
        "outbox, or the application itself"
    )


def test_what_has_no_signature_is_no_app(small_shop: Shop) -> None:
    small_shop.append("\nodd = dict.fromkeys\nclass Odd:\n    __signature__ = 1\n")
    small_shop.append("    def __call__(self): ...\nodd = Odd()\n")

    assert "neither an Outbox nor an ASGI app, but of class Odd" in said(small_shop, "odd")


def test_an_app_without_an_outbox_is_told_where_one_is_made(small_shop: Shop, place: Path) -> None:
    (place / f"{small_shop.name}.py").write_text("from fastapi import FastAPI\napp = FastAPI()\n")

    assert said(small_shop, "app") == (
        "Error: shop:app has no outbox: make one with Outbox(bus, engine), in a module that "
        "the application imports"
    )


def test_of_several_outboxes_one_has_to_be_named(small_shop: Shop) -> None:
    small_shop.append(
        "\nother = Outbox(EventBus(name='other'), create_engine('sqlite:///other.db'))\n"
    )

    line = said(small_shop, "app")

    assert line.startswith("Error: shop:app has several outboxes, of the buses ")
    assert "'shop', 'other'" in line
    assert line.endswith(": name one of them as module:attr")


def test_a_path_leads_to_an_attribute_of_an_attribute(small_shop: Shop) -> None:
    small_shop.append("\nclass Wiring:\n    kept = outbox\n")

    assert small_shop("stats", attr="Wiring.kept").exit_code == 0


def test_an_outbox_without_its_own_extra_is_told_what_to_install(
    small_shop: Shop, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / f"{small_shop.name}.py").write_text("from fastapi import FastAPI\napp = FastAPI()\n")
    for name in [each for each in sys.modules if each.startswith("eventkit.outbox")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydantic", None)

    assert said(small_shop, "app") == (
        "Error: eventkit.outbox needs pydantic, which is not installed: install "
        "fastapi-eventkit[outbox]"
    )


@pytest.mark.parametrize("package", ["click", "rich"])
def test_the_command_without_its_extra_says_what_to_install(package: str) -> None:
    script = f"import sys; sys.modules[{package!r}] = None; from eventkit._cli import main; main()"

    ended = run_python("-c", script)

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == (
        f"Error: the command needs {package}, which is not installed: install "
        "fastapi-eventkit[cli]\n"
    )


def test_another_package_that_is_missing_is_no_matter_of_the_extra() -> None:
    script = "import sys; sys.modules['rich.table'] = None; from eventkit._cli import main; main()"

    assert "ModuleNotFoundError" in run_python("-c", script).stderr


def test_python_runs_the_command_as_a_module_from_the_current_directory(tmp_path: Path) -> None:
    name = f"shop_{uuid4().hex[:8]}"
    (tmp_path / f"{name}.py").write_text("outbox = None")

    ended = run_python("-m", "eventkit", "outbox", "stats", f"{name}:outbox", cwd=tmp_path)

    assert ended.returncode == 2
    assert ended.stderr.startswith(f"Error: {name}:outbox is neither an Outbox nor an ASGI app")


def test_the_exit_codes_are_in_the_help_of_each_command(small_shop: Shop) -> None:
    for words in ([], ["relay"], ["outbox"], ["outbox", "drop"]):
        result = small_shop.command(*words, "--help")

        assert result.exit_code == 0
        assert "  3  the database does not answer, or its tables are missing" in result.stdout
