"""What the shop has wired to what, so that a change of it shows in a review."""

from examples.shop.app import create_app
from examples.shop.settings import Settings

WIRING = """\
eventkit.DomainEvent -> audit.write_row, thread
examples.shop.orders.events.OrderPlaced -> orders.collect_payment, thread
examples.shop.orders.events.OrderPlaced -> orders.send_confirmation, thread
examples.shop.orders.events.StockTaken -> orders.tell_warehouse, 30 s
examples.shop.users.events.UserCreated -> users.send_welcome_mail, thread"""


def test_the_shop_is_wired_as_it_was_reviewed() -> None:
    bus = create_app(Settings()).state.resources.bus

    wiring = [
        f"{w['event_type']} -> {w['handler']}, "
        + ("thread" if w["thread"] else f"{w['timeout']:g} s" if w["timeout"] else "no limit")
        for w in bus.describe()
    ]

    # Without places, which differ between machines and move with every edit.
    assert "\n".join(sorted(wiring)) == WIRING
