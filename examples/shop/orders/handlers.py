"""Owns what follows from things that are sold."""

from __future__ import annotations

from eventkit import Durable, EventRouter, current_delivery
from eventkit.outbox import complete_with
from examples.shop.database import PaymentRow
from examples.shop.orders.events import OrderPlaced, StockTaken
from examples.shop.resources import FromApp, Post, Till, Transaction
from examples.shop.retries import unless_refused

router = EventRouter()


@router.on(StockTaken, name="orders.tell_warehouse", durable=Durable(backoff=unless_refused))
async def tell_warehouse(event: StockTaken, resources: FromApp) -> None:
    """Fails while the warehouse is down, which nobody else notices, and is tried again."""
    report = {"sku": event.sku, "taken": event.quantity, "left": event.left}
    response = await resources.http.post(resources.settings.warehouse_url, json=report)
    response.raise_for_status()


@router.on(OrderPlaced, name="orders.send_confirmation", durable=True)
def send_confirmation(event: OrderPlaced, mailer: Post) -> None:
    """A plain `def`, because smtplib blocks: eventkit runs it in a worker thread."""
    total = f"{event.total_cents / 100:.2f}"
    mailer.send(
        event.email,
        f"Your order {event.order_id}",
        f"That makes {total}.",
        key=current_delivery().id,
    )


@router.on(OrderPlaced, name="orders.collect_payment", durable=Durable(backoff=unless_refused))
def collect_payment(event: OrderPlaced, payments: Till, session: Transaction) -> None:
    """Collect the money, then note it; whatever fails in between, both happen once.

    The delivery's id is the same at every attempt, and no other delivery has it: the provider
    collects once for each. The commit that notes the payment completes the delivery, too.
    """
    key = current_delivery().id
    payments.charge(event.order_id, event.total_cents, key=key)
    complete_with(session)
    session.add(PaymentRow(order_id=event.order_id, cents=event.total_cents, key=key))
