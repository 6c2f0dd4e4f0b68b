"""Owns what can happen to users."""

from __future__ import annotations

from dataclasses import dataclass

from eventkit import DomainEvent


@dataclass(frozen=True, slots=True)
class UserCreated(DomainEvent):
    """Somebody signed up."""

    user_id: int
    email: str
    name: str
