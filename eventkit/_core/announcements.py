"""Owns what the log and observers are told when events move. Moves none itself."""

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
    """These were accepted."""
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
    """These will be delivered. Each is announced once, however often it is released."""
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
    """These will not run; counts them, too. What an outbox keeps is requeued instead of lost."""
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
    """The outcome of a delivery that was not run or was ended, given what an outbox keeps."""
    if outcome is Outcome.UNDELIVERED and rows is not None and index in rows:
        return Outcome.REQUEUED
    return outcome


def announce_skipped(
    state: BusState, deliveries: Sequence[Delivery], outcome: Outcome, reason: str | None = None
) -> None:
    """These deliveries will not run here; counts them, too."""
    state.tally.end(outcome, len(deliveries))
    announce_lost(state, deliveries, outcome, reason)


def announce_lost(
    state: BusState, deliveries: Sequence[Delivery], outcome: Outcome, reason: str | None = None
) -> None:
    """These deliveries, which have been counted, were dropped or ended."""
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
    """Of which events they are, and how many of each: never the payload."""
    kinds = Counter(type_name(type(delivery.event)) for delivery in deliveries)
    return ", ".join(f"{kind} x{times}" for kind, times in kinds.items())
