"""Owns how users are kept in the database. Commits nothing: the session's owner does."""

from __future__ import annotations

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from examples.shop.database import UserRow
from examples.shop.users.usecases import EmailTaken


class SqlUsers:
    """Users in the transaction of a session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, name: str, email: str) -> int:
        """Let the unique constraint decide, as two sign-ups can come at once."""
        row = UserRow(name=name, email=email)
        self._session.add(row)
        try:
            self._session.flush()
        except IntegrityError:
            raise EmailTaken(email) from None
        return row.id
