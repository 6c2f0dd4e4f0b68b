"""What importing costs, and what is said where a package is missing."""

import json
import subprocess
import sys

import pytest

from tests.wire.test_codec import Line


def run(script: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    return ended.stdout.strip()


@pytest.mark.parametrize("name", ["eventkit", "eventkit.wire"])
def test_importing_it_imports_neither_pydantic_nor_msgspec_nor_sqlalchemy(name: str) -> None:
    imported = run(f"import json, sys, {name}; print(json.dumps(list(sys.modules)))")

    assert not {"pydantic", "pydantic_core", "msgspec", "attrs", "sqlalchemy"} & set(
        json.loads(imported)
    )


def test_naming_a_class_imports_neither() -> None:
    script = (
        "import sys\n"
        "from eventkit.wire import named, names_of\n"
        "@named('x', formerly={'y': None})\n"
        "class Order: ...\n"
        "print(names_of(Order), 'pydantic' in sys.modules, 'msgspec' in sys.modules)"
    )

    assert run(script) == "('x', 'y') False False"


def test_a_missing_pydantic_is_told_with_the_extra() -> None:
    script = (
        "import sys; sys.modules['pydantic'] = None\n"
        "from dataclasses import dataclass\n"
        "from eventkit.wire import codec_for\n"
        "Order = dataclass(type('Order', (), {}))\n"
        "try:\n    codec_for(Order)\n"
        "except ModuleNotFoundError as error:\n    print(error.name, error, sep=': ')"
    )

    assert run(script) == (
        "pydantic: storing events of this type needs pydantic, which is not installed: install "
        "fastapi-eventkit[outbox]"
    )


def test_a_missing_msgspec_is_told_with_the_package() -> None:
    script = (
        "import sys; sys.modules['msgspec'] = None\n"
        "import attrs\n"
        "from eventkit.wire import codec_for\n"
        "Order = attrs.define(type('Order', (), {}))\n"
        "try:\n    codec_for(Order)\n"
        "except ModuleNotFoundError as error:\n    print(error.name, error, sep=': ')"
    )

    assert run(script) == (
        "msgspec: storing events of this type needs msgspec, which is not installed: install "
        "msgspec"
    )


def test_a_row_can_be_read_by_a_process_that_never_wrote_one() -> None:
    script = (
        "from tests.wire.test_codec import Line\n"
        "from eventkit.wire import codec_for, wire_name\n"
        'print(codec_for(Line).decode(\'{"sku": "a", "price": "1.10"}\', wire_name(Line)))'
    )

    assert run(script) == repr(Line("a", __import__("decimal").Decimal("1.10")))
