"""Owns what can happen to users.

The names are what the outbox keeps: a class may be renamed or moved, and what was kept before is
still read. Another shape of an event is another version: see `named`.
"""

from __future__ import annotations

from dataclasses import dataclass

from eventkit import DomainEvent, named


@named("shop.user.created.v1")
@dataclass(frozen=True, slots=True)
class UserCreated(DomainEvent):
    """Somebody signed up."""

    user_id: int
    email: str
    name: str
