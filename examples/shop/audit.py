"""Owns the audit log: one row for each thing that happened, whatever it was."""

from __future__ import annotations

import json
from dataclasses import asdict

from eventkit import DomainEvent, EventRouter
from eventkit.outbox import complete_with
from examples.shop.database import AuditRow
from examples.shop.resources import Transaction

router = EventRouter()


@router.on(DomainEvent, name="audit.write_row", durable=True)
def write_row(event: DomainEvent, session: Transaction) -> None:
    """Hear of every event, because each is a `DomainEvent`; written in a transaction of its own.

    The commit that writes the row completes the delivery, too: it is written exactly once.
    """
    complete_with(session)
    session.add(
        AuditRow(
            event_id=event.event_id,
            occurred_at=event.occurred_at,
            kind=type(event).__name__,
            payload=json.dumps(asdict(event), default=str),
        )
    )
