"""What the shop has wired to what, so that a change of it shows in a review."""

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from examples.shop.app import create_app
from examples.shop.settings import Settings

WIRING = """\
eventkit.DomainEvent -> audit.write_row, thread, durable
examples.shop.orders.events.OrderPlaced -> orders.collect_payment, thread, durable
examples.shop.orders.events.OrderPlaced -> orders.send_confirmation, thread, durable
examples.shop.orders.events.StockTaken -> orders.tell_warehouse, 30 s, durable
examples.shop.users.events.UserCreated -> users.send_welcome_mail, thread, durable"""


def test_the_shop_is_wired_as_it_was_reviewed() -> None:
    bus = create_app(Settings()).state.resources.bus

    wiring = [
        f"{w['event_type']} -> {w['handler']}, "
        + ("thread" if w["thread"] else f"{w['timeout']:g} s" if w["timeout"] else "no limit")
        + (", durable" if w["durable"] else "")
        for w in bus.describe()
    ]

    # Without places, which differ between machines and move with every edit.
    assert "\n".join(sorted(wiring)) == WIRING
