"""Owns what follows from things that are sold."""

from __future__ import annotations

from eventkit import EventRouter, current_delivery
from examples.shop.database import PaymentRow
from examples.shop.orders.events import OrderPlaced, StockTaken
from examples.shop.resources import FromApp, Post, Till, Transaction

router = EventRouter()


@router.on(StockTaken, name="orders.tell_warehouse")
async def tell_warehouse(event: StockTaken, resources: FromApp) -> None:
    """Fails when the warehouse is down, which nobody else notices."""
    report = {"sku": event.sku, "taken": event.quantity, "left": event.left}
    response = await resources.http.post(resources.settings.warehouse_url, json=report)
    response.raise_for_status()


@router.on(OrderPlaced, name="orders.send_confirmation")
def send_confirmation(event: OrderPlaced, mailer: Post) -> None:
    """A plain `def`, because smtplib blocks: eventkit runs it in a worker thread."""
    total = f"{event.total_cents / 100:.2f}"
    mailer.send(event.email, f"Your order {event.order_id}", f"That makes {total}.")


@router.on(OrderPlaced, name="orders.collect_payment")
async def collect_payment(event: OrderPlaced, payments: Till, session: Transaction) -> None:
    """Note the payment and collect it; where that fails, the note is rolled back, and only that.

    The delivery's id is the same at every attempt, and no other delivery has it.
    """
    key = current_delivery().id
    session.add(PaymentRow(order_id=event.order_id, cents=event.total_cents, key=key))
    await session.flush()  # who cannot note it takes no money
    await payments.charge(event.order_id, event.total_cents, key=key)
