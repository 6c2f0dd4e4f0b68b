"""The example that plugs another container in: its scopes are those of deliveries."""

import logging

import pytest

from examples.dishka_container import main


@pytest.mark.anyio
async def test_a_ledger_of_dishka_is_committed_by_the_handler_that_ends_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    book: list[str] = []

    bus = await main(book)

    assert book == ["bookkeeper wrote order 1", "bookkeeper wrote order 2"]
    assert (bus.stats.handled, bus.stats.failed) == (2, 2)
    failed = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(failed) == 2
