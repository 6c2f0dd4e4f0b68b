"""Owns what the shop does for users. Knows no HTTP, no SQL and no handler."""

from __future__ import annotations

from typing import Protocol

from eventkit import Publisher
from examples.shop.users.events import UserCreated


class EmailTaken(Exception):
    """Somebody signed up with this address before."""

    def __init__(self, email: str) -> None:
        super().__init__(f"{email} has signed up already")


class Users(Protocol):
    """Where users are kept."""

    def add(self, name: str, email: str) -> int:
        """Keep a new user and return its id.

        Raises:
            EmailTaken: Somebody has this address already.
        """
        ...


class CreateUser:
    """Sign somebody up, and say so."""

    def __init__(self, users: Users, events: Publisher) -> None:
        self._users = users
        self._events = events

    def execute(self, name: str, email: str) -> int:
        """Return the new user's id.

        Raises:
            EmailTaken: Somebody has this address already.
        """
        user_id = self._users.add(name, email)
        self._events.publish(UserCreated(user_id, email, name))
        return user_id
