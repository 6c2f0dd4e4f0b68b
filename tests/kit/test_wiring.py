"""Assertions about who is subscribed to what."""

import pytest

from eventkit import EventBus
from eventkit.exceptions import InvalidEventTypeError
from eventkit.testing import assert_handles, assert_no_orphans
from tests.kit.orders import OrderPlaced, ReceiptSent, Viewed
from tests.witness import nothing


class Mailer:
    async def send(self, event: object) -> None: ...

    async def __call__(self, event: object) -> None: ...


def test_handlers_are_named_by_themselves_or_by_name_and_others_do_not_matter(
    bus: EventBus,
) -> None:
    mailer = Mailer()
    bus.subscribe(OrderPlaced, mailer.send)
    bus.subscribe(OrderPlaced, mailer)
    bus.subscribe(object, nothing)

    assert_handles(bus, OrderPlaced, "send_receipt", mailer.send, mailer, nothing)
    assert_handles(bus, Viewed, nothing)
    assert_handles(bus, OrderPlaced)


def test_a_handler_that_is_missing_is_named_beside_those_that_are_there(bus: EventBus) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_handles(bus, OrderPlaced, "send_receipt", nothing, "audit")

    assert str(caught.value).startswith(
        "tests.kit.orders.OrderPlaced should reach nothing, audit, but reaches only:\n"
        "  send_receipt ("
    )


def test_an_event_that_nobody_handles_has_a_likely_cause(bus: EventBus) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_handles(bus, Viewed, Mailer().send)
    assert str(caught.value) == (
        "tests.kit.orders.Viewed should reach Mailer.send, but nobody handles it. Is the module "
        "with the handlers imported, and its router included?"
    )
    with pytest.raises(AssertionError, match="should reach any handler, but nobody handles it"):
        assert_handles(bus, Viewed)


def test_orphans_are_listed(bus: EventBus) -> None:
    assert_no_orphans(bus, [OrderPlaced, ReceiptSent])
    with pytest.raises(AssertionError) as caught:
        assert_no_orphans(bus, [OrderPlaced, Viewed, str])

    assert str(caught.value) == (
        "nobody on bus 'default' handles:\n  tests.kit.orders.Viewed\n  builtins.str"
    )


def test_what_checks_nothing_is_a_mistake(bus: EventBus) -> None:
    with pytest.raises(ValueError, match="no event types were given, so nothing was checked"):
        assert_no_orphans(bus, [])
    with pytest.raises(InvalidEventTypeError):
        assert_handles(bus, Viewed("/"))  # type: ignore[arg-type]
