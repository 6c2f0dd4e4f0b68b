"""Owns what follows from things that happen to users."""

from __future__ import annotations

from eventkit import EventRouter, current_delivery
from examples.shop.resources import Post
from examples.shop.users.events import UserCreated

router = EventRouter()


@router.on(UserCreated, name="users.send_welcome_mail", durable=True)
def send_welcome_mail(event: UserCreated, mailer: Post) -> None:
    """A plain `def`, because smtplib blocks: eventkit runs it in a worker thread."""
    mailer.send(
        event.email,
        f"Welcome, {event.name}!",
        "Your first tea is on us.",
        key=current_delivery().id,
    )
