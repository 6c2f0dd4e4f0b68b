"""Owns how the outbox receives the event of a message: it stores the event, then delivers it.

Knows no SQL, and nothing of brokers.
"""

from __future__ import annotations

import logging
from contextvars import copy_context
from time import time_ns

from eventkit._core.announcements import announce_published
from eventkit._core.context import EventContext
from eventkit._core.events import Incoming, type_name
from eventkit._core.locations import caller
from eventkit._core.log import log
from eventkit._core.queue import Envelope, Verdict
from eventkit._core.state import BusState
from eventkit._core.units import Unit, next_number
from eventkit.exceptions import EventDepthError
from eventkit.outbox._keeper import Keeper


async def receive(
    state: BusState,
    keeper: Keeper,
    event: object,
    incoming: Incoming,
    consumer: str,
    message_id: str,
) -> bool:
    """Store and deliver an event; False if the message was received before.

    See `Outbox.receive`. The event is staged after the commit, because a staged event is delivered
    even if the commit fails. There is no checkpoint between the commit and the staging.
    """
    unit = Unit(state)
    unit.independent = True
    async with EventContext(unit):
        envelope = _envelope_of(unit, event, incoming)
        del event  # or a traceback that shows local variables shows the payload
        if envelope.plan.durable:
            _accept(keeper, envelope)
        if not await keeper.receive(envelope, consumer, message_id):
            log(
                logging.DEBUG,
                "a message was received before, and is dropped",
                error=None,
                consumer=consumer,
                message_id=message_id,
                event_type=type_name(type(envelope.event)),
                bus=state.name,
            )
            return False
        _stage(unit, envelope)
        host = unit.host()
        unit.background = host is not None and not host.is_crowded()
        return True


def _envelope_of(unit: Unit, event: object, incoming: Incoming) -> Envelope:
    """Make the envelope of an event as a publish does, but already released."""
    state, cause = unit.state, unit.delivery
    if cause is not None and cause.depth >= state.max_depth:
        chain = [str(delivery) for delivery in cause.chain()]
        raise EventDepthError(type_name(type(event)), state.max_depth, chain)
    return Envelope(
        event,
        state.plan_for(event),
        copy_context(),
        cause,
        time_ns(),
        next_number(),
        Verdict.RELEASED,
        caller() if state.debug else None,
        incoming,
    )


def _accept(keeper: Keeper, envelope: Envelope) -> None:
    """Make the rows of the event.

    Raises:
        ValueError, TypeError: No rows can be made for the event. Another try would fail, too.
    """
    try:
        keeper.accept(envelope)
    except (ValueError, TypeError):
        raise
    except Exception as error:
        kind = type(error).__qualname__
        raise ValueError(f"the key function of a durable handler failed: {kind}") from error


def _stage(unit: Unit, envelope: Envelope) -> None:
    """Stage the event, so that the unit delivers it. No transaction takes part."""
    state = unit.state
    told = state.observers
    refusal = unit.queue.stage(
        [envelope], state.max_events, watched=told.watches_decisions, tag=None
    )
    assert refusal is None, "a unit that is open and empty"
    if told.published:
        announce_published(state, [envelope])
