"""Owns the log lines and observer calls when events move. It moves no events."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from eventkit._core.events import Delivery, type_name
from eventkit._core.log import log
from eventkit._core.observers import Insider, Observer, complain, contained
from eventkit._core.queue import Envelope, Rows
from eventkit._core.state import BusState
from eventkit._core.stats import Outcome


def announce_published(state: BusState, envelopes: Sequence[Envelope]) -> None:
    """Announce that these events were accepted."""
    for observer in state.observers.published:
        for envelope in envelopes:
            try:
                if isinstance(observer, Insider):
                    observer.accepted(envelope)
                else:
                    observer.published(envelope.event, envelope.deliveries())
            except Exception as error:  # noqa: BLE001 - an observer is user code
                complain(observer, error)


def announce_released(state: BusState, envelopes: Sequence[Envelope]) -> None:
    """Announce that these events will be delivered. Each event is announced once."""
    told = state.observers.released
    if not told:
        return
    with state.tally.lock:
        news = [envelope for envelope in envelopes if not envelope.announced]
        for envelope in news:
            envelope.announced = True
    for observer in told if news else ():
        with contained(observer):
            observer.released([envelope.event for envelope in news])


def announce_dropped(
    state: BusState, envelopes: Sequence[Envelope], outcome: Outcome, reason: str | None = None
) -> None:
    """Count and announce events that will not run. Deliveries in an outbox are requeued."""
    if outcome is Outcome.DISCARDED:
        for observer in state.observers.withdrawn if envelopes else ():
            with contained(observer):
                observer.withdrawn([envelope.event for envelope in envelopes])
    dropped: dict[Outcome, list[Delivery]] = {outcome: []}
    for envelope in envelopes:
        for index, delivery in enumerate(envelope.deliveries()):
            dropped.setdefault(what_becomes_of(outcome, index, envelope.rows), []).append(delivery)
    for what, deliveries in dropped.items():
        announce_skipped(state, deliveries, what, reason)


def what_becomes_of(outcome: Outcome, index: int, rows: Rows | None) -> Outcome:
    """The outcome of a delivery that did not run to its end: REQUEUED if an outbox stores it."""
    if outcome is Outcome.UNDELIVERED and rows is not None and index in rows:
        return Outcome.REQUEUED
    return outcome


def announce_skipped(
    state: BusState, deliveries: Sequence[Delivery], outcome: Outcome, reason: str | None = None
) -> None:
    """Count and announce deliveries that will not run here."""
    state.tally.end(outcome, len(deliveries))
    announce_lost(state, deliveries, outcome, reason)


def announce_lost(
    state: BusState, deliveries: Sequence[Delivery], outcome: Outcome, reason: str | None = None
) -> None:
    """Announce deliveries that were dropped or ended, and that have been counted."""
    if not deliveries:
        return
    undelivered = outcome is Outcome.UNDELIVERED
    if undelivered and state.losses:
        with state.tally.lock:
            for lost in state.losses:
                lost.update(delivery.handler for delivery in deliveries)
    usual = logging.DEBUG if outcome is Outcome.REQUEUED else logging.INFO
    log(
        logging.ERROR if undelivered else usual,
        f"deliveries {outcome.value}",
        bus=state.name,
        deliveries=len(deliveries),
        event_types=event_types(deliveries),
        error=None,
        **({} if reason is None else {"reason": reason}),
    )
    told: tuple[Observer, ...] = getattr(state.observers, outcome.value)
    for observer in told:
        with contained(observer):
            getattr(observer, outcome.value)(deliveries)


def event_types(deliveries: Sequence[Delivery]) -> str:
    """The types of their events, and how many of each; without the payload."""
    kinds = Counter(type_name(type(delivery.event)) for delivery in deliveries)
    return ", ".join(f"{kind} x{times}" for kind, times in kinds.items())
