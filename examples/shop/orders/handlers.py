"""Owns what follows from things that are sold."""

from __future__ import annotations

import httpx

from eventkit import EventRouter
from examples.shop.mail import Mailer
from examples.shop.orders.events import OrderPlaced, StockTaken


def order_handlers(mailer: Mailer, http: httpx.AsyncClient, warehouse_url: str) -> EventRouter:
    """Handlers that share this mailer and this HTTP client."""
    router = EventRouter()

    @router.on(StockTaken, name="orders.tell_warehouse")
    async def tell_warehouse(event: StockTaken) -> None:
        """Fails when the warehouse is down, which nobody else notices."""
        report = {"sku": event.sku, "taken": event.quantity, "left": event.left}
        response = await http.post(warehouse_url, json=report)
        response.raise_for_status()

    @router.on(OrderPlaced, name="orders.send_confirmation")
    def send_confirmation(event: OrderPlaced) -> None:
        """A plain `def`, because smtplib blocks: eventkit runs it in a worker thread."""
        total = f"{event.total_cents / 100:.2f}"
        mailer.send(event.email, f"Your order {event.order_id}", f"That makes {total}.")

    return router
