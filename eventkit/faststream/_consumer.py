"""Owns what becomes of a message: it is read, delivered, and answered. Knows no broker by name.

FastStream calls the consumer as its handler. Each message has one answer:

| what happens | answer |
|---|---|
| all handlers have ended well, or an outbox keeps the event | acknowledged |
| it cannot be read, or its handlers fail to the end | a dead letter, then acknowledged |
| it was given out too often | the same |
| a handler raises `RejectMessage` | the same, at once |
| a handler raises `NackMessage` | handed back after a pause |
| the inbox, or the destination of dead letters, is not available | handed back after a pause |
| the process ends meanwhile | handed back |

FastStream's policy decides nothing here: what it does with errors loses messages on some brokers.
It acknowledges what returns, whatever the policy is. What is handed back is answered here: a
middleware of the user's may swallow what is raised, and FastStream would acknowledge it.
"""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, TypedDict

from anyio import fail_after, move_on_after, sleep
from faststream.exceptions import NackMessage
from structlog.contextvars import bind_contextvars, reset_contextvars

from eventkit._core.ambient import carried
from eventkit._core.log import log
from eventkit._core.policy import cancel_requests, is_asked_to_end
from eventkit._core.state import BusState
from eventkit.exceptions import BadMessageError
from eventkit.faststream._engines import LONGEST_ID, Engine, plain
from eventkit.faststream._forward import send
from eventkit.wire import Received, decode

PAUSE = 1.0  # seconds before a message is handed back
DEAD_PAUSE = 2.0  # seconds, where a dead letter was not accepted
_DEAD_WITHIN = 10.0  # seconds until it has to have confirmed one
_FAREWELL = 2.0  # seconds to hand a message back when its task is cancelled
_LONGEST = 500  # characters of an error in a header
_ROUNDS = 10  # how often one message may become a dead letter again
_TRACE = ("traceparent", "tracestate")
# Headers of a dead letter, beside those of the message.
_REASON, _ERROR = "eventkit-reason", "eventkit-error"
_BY, _ROUND = "eventkit-consumer", "eventkit-round"
# What a broker or FastStream makes anew for each message; other names with "x-" are the user's.
_OF_ONE_MESSAGE = (
    *("nats-", "reply_to", "message_id", "correlation_id"),
    *("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count"),
)


class Problem(NamedTuple):
    """Why a message is dead, in a word and in a sentence."""

    reason: str
    error: str


class _Facts(TypedDict):
    consumer: str
    bus: str


class HandBackError(Exception):
    """The message is to come again: here later, or to another process.

    Attributes:
        pause: Seconds to wait before.
    """

    def __init__(self, pause: float = PAUSE) -> None:
        super().__init__()
        self.pause = pause


class Deliver(Protocol):
    """Takes a message's event to its handlers, or to an inbox."""

    async def refuse(self, message: Any, subscriber: Any) -> Problem | None:
        """Say why a message is dead before it is read; None if it is not."""
        ...

    async def __call__(self, received: Received, subscriber: Any) -> Problem | None:
        """Deliver the event, and say why its message is dead; None if it is not.

        Raises:
            HandBackError: The message is to come again.
        """
        ...


class Consumer:
    """Takes the messages of one consumer of a broker.

    Args:
        state: The state of the bus that has the handlers.
        types: The classes of events that may come.
        name: The name of the consumer.
        dead_letter: A publisher of FastStream's. Any: each broker has its own class.
        dead_engine: The engine of the publisher's broker.
        deliver: Takes the event of a message that was read.
        ignores: Whether messages of other types are acknowledged, and forgotten.
    """

    def __init__(
        self,
        state: BusState,
        types: Sequence[type],
        name: str,
        dead_letter: Any,
        dead_engine: Engine,
        deliver: Deliver,
        *,
        ignores: bool,
    ) -> None:
        self._state = state
        self._types = tuple(types)
        self._name = name
        self._dead_letter = dead_letter
        self._dead_engine = dead_engine
        self._deliver = deliver
        self._ignores = ignores

    async def receive(self, message: Any, subscriber: Any) -> None:
        """Take one message. A return acknowledges it.

        Args:
            message: The message as FastStream has parsed it.
            subscriber: The subscriber that has received it.

        Raises:
            NackMessage: The message was handed back.
        """
        # FastStream would answer who asks for it, with nothing; where that fails, the message would
        # be lost, or come again at once, although its handlers have ended well.
        message.reply_to = ""
        try:
            pause = await self._take(message, subscriber)
            if pause is not None and subscriber.running:  # else another process should have it soon
                await sleep(pause)
        except BaseException:  # FastStream answers some wrongly, and others not at all
            with move_on_after(_FAREWELL, shield=True):
                await _hand_back(message)
            raise
        if pause is not None:
            await _hand_back(message)
            raise NackMessage

    async def _take(self, message: Any, subscriber: Any) -> float | None:
        """Deliver or bury a message; the seconds after which it is handed back, or None."""
        requests = cancel_requests()
        try:
            problem = await self._problem(message, subscriber)
            if problem is not None:
                await self._bury(message, problem)
        except HandBackError as again:
            return again.pause
        except (Exception, CancelledError) as error:  # whatever it is, the message is not lost
            if isinstance(error, CancelledError) and is_asked_to_end(requests):
                raise
            log(
                logging.ERROR,
                "a message could not be handled, and is handed back",
                error=error,
                **self._facts(),
            )
            return PAUSE
        return None

    async def _problem(self, message: Any, subscriber: Any) -> Problem | None:
        """Deliver a message, and say why it is dead; None if it is not."""
        problem = await self._deliver.refuse(message, subscriber)
        if problem is not None:
            return problem
        headers = headers_of(message)
        try:
            received = decode(headers, message.body, *self._types)
        except BadMessageError as error:
            if error.reason == "unknown" and self._ignores:
                return None
            return Problem(error.reason, str(error))
        before = carried.set({name: headers[name] for name in _TRACE if name in headers})
        bound = bind_contextvars(correlation_id=message.correlation_id)
        try:
            return await self._deliver(received, subscriber)
        finally:
            reset_contextvars(**bound)
            carried.reset(before)

    async def _bury(self, message: Any, problem: Problem) -> None:
        """Publish a dead letter.

        Raises:
            HandBackError: The dead letter was not accepted.
        """
        kept = {
            name: value
            for name, value in headers_of(message).items()
            if not name.lower().startswith(_OF_ONE_MESSAGE)
        }
        rounds = _number(kept.get(_ROUND)) if kept.get(_BY) == self._name else 0
        headers = kept | {
            _REASON: problem.reason,
            _ERROR: plain(problem.error, _LONGEST),
            _BY: self._name,
            _ROUND: str(rounds + 1),
        }
        options = self._dead_engine.dead_options(message, headers)
        options["correlation_id"] = plain(message.correlation_id or "", LONGEST_ID) or None
        try:
            if rounds >= _ROUNDS:
                raise RecursionError(
                    f"it has been a dead letter {rounds} times: they come back to this consumer"
                )
            with fail_after(_DEAD_WITHIN):
                await send(self._dead_letter, self._dead_engine, message.body or b"", options)
        except Exception as away:  # noqa: BLE001 - of a broker, or of its client
            log(
                logging.ERROR,
                "a dead letter was not accepted: the message stays where it is",
                error=away,
                reason=problem.reason,
                failed_with=problem.error,
                **self._facts(),
            )
            raise HandBackError(DEAD_PAUSE) from None
        log(
            logging.ERROR,
            "a message has become a dead letter",
            reason=problem.reason,
            failed_with=problem.error,
            **self._facts(),
        )

    def _facts(self) -> _Facts:
        return {"consumer": self._name, "bus": self._state.name}


async def _hand_back(message: Any) -> None:
    with suppress(Exception):  # the connection is gone, so the message comes again by itself
        await message.nack()


def headers_of(message: Any) -> dict[str, str]:
    """The headers of a message as texts, with the type of its content."""
    headers: Mapping[str, object] = message.headers
    texts = {name: value if type(value) is str else _text(value) for name, value in headers.items()}
    if message.content_type and "content-type" not in texts:  # RabbitMQ has it beside them
        texts["content-type"] = message.content_type
    return texts


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
