"""Owns the audit log: one row for each thing that happened, whatever it was."""

from __future__ import annotations

import json
from dataclasses import asdict

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from eventkit import DomainEvent, EventRouter
from examples.shop.database import AuditRow


def audit_handlers(sessions: async_sessionmaker[AsyncSession]) -> EventRouter:
    """Handlers that write the audit log, in transactions of their own."""
    router = EventRouter()

    @router.on(DomainEvent, name="audit.write_row")
    async def write_row(event: DomainEvent) -> None:
        """Hear of every event, because each is a `DomainEvent`."""
        row = AuditRow(
            event_id=event.event_id,
            occurred_at=event.occurred_at,
            kind=type(event).__name__,
            payload=json.dumps(asdict(event), default=str),
        )
        async with sessions.begin() as session:
            session.add(row)

    return router
