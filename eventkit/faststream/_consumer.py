"""Owns the handling of a received message: read, deliver, answer. Knows no broker by name.

FastStream calls the consumer as its handler. Each message gets one answer:

| event | answer |
|---|---|
| all handlers have succeeded, or an outbox keeps the event | acknowledge |
| the message cannot be read, or handlers fail in all attempts | dead letter, then acknowledge |
| the broker has given out the message too often | dead letter, then acknowledge |
| a handler raises `RejectMessage` | dead letter, then acknowledge, without further attempts |
| a handler raises `NackMessage` | hand back after a pause |
| the inbox, or the destination of dead letters, is not available | hand back after a pause |
| the process stops | hand back |

To *hand back* is to tell the broker that it should deliver the message again.

The `ack_policy` of FastStream decides nothing here, because on some brokers it loses messages after
an error. FastStream acknowledges a message if its handler returns. The consumer itself hands back
the others: a middleware of the user may swallow the exception, and FastStream would acknowledge the
message then.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, TypedDict

from anyio import fail_after, get_cancelled_exc_class, move_on_after, sleep
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
DEAD_PAUSE = 2.0  # seconds, if the broker has not accepted the dead letter
_DEAD_WITHIN = 10.0  # seconds within which the broker has to confirm a dead letter
_FAREWELL = 2.0  # seconds to hand a message back when its task is cancelled
_LONGEST = 500  # characters of an error in a header
_ROUNDS = 10  # how often one message may become a dead letter again
_TRACE = ("traceparent", "tracestate")
# Headers that a dead letter has in addition to those of the message.
_REASON, _ERROR = "eventkit-reason", "eventkit-error"
_BY, _ROUND = "eventkit-consumer", "eventkit-round"
# A broker or FastStream sets these for each message. Other names with "x-" belong to the user.
_OF_ONE_MESSAGE = (
    *("nats-", "reply_to", "message_id", "correlation_id"),
    *("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count"),
)


class Problem(NamedTuple):
    """The reason why a message becomes a dead letter, as a word and as a sentence."""

    reason: str
    error: str


class _Facts(TypedDict):
    consumer: str
    bus: str


class HandBackError(Exception):
    """Raised to hand the message back. It comes again, here or in another process.

    Attributes:
        pause: Seconds to wait before the message is handed back.
    """

    def __init__(self, pause: float = PAUSE) -> None:
        super().__init__()
        self.pause = pause


class Deliver(Protocol):
    """Delivers the event of a message to its handlers or to an inbox."""

    async def refuse(self, message: Any, subscriber: Any) -> Problem | None:
        """Check a message before it is read; return the problem of a dead letter, or None."""
        ...

    async def __call__(self, received: Received, subscriber: Any) -> Problem | None:
        """Deliver the event; return the problem of a dead letter, or None.

        Raises:
            HandBackError: The message has to come again.
        """
        ...


class Consumer:
    """Handles the messages of one consumer of a broker.

    Args:
        state: The state of the bus that has the handlers.
        types: The classes of events that may come.
        name: The name of the consumer.
        dead_letter: A publisher of FastStream. Any: each broker has its own class.
        dead_engine: The engine of the publisher's broker.
        deliver: Delivers the event of a message.
        ignores: Whether messages of other types are acknowledged and dropped.
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
        """Handle one message. If this returns, FastStream acknowledges the message.

        Args:
            message: The message as FastStream has parsed it.
            subscriber: The subscriber that has received it.

        Raises:
            NackMessage: The message was handed back.
        """
        # FastStream would send an empty reply to a message with `reply_to`. If the reply failed,
        # the message would be lost or come again, although its handlers have succeeded.
        message.reply_to = ""
        try:
            pause = await self._take(message, subscriber)
            if pause is not None and subscriber.running:  # no pause while the process stops
                await sleep(pause)
        except BaseException:  # for some exceptions FastStream gives a wrong answer or none
            with move_on_after(_FAREWELL, shield=True):
                await _hand_back(message)
            raise
        if pause is not None:
            await _hand_back(message)
            raise NackMessage

    async def _take(self, message: Any, subscriber: Any) -> float | None:
        """Deliver a message or make it a dead letter; return the pause if it is handed back."""
        requests = cancel_requests()
        try:
            problem = await self._problem(message, subscriber)
            if problem is not None:
                await self._bury(message, problem)
        except HandBackError as again:
            return again.pause
        except (Exception, get_cancelled_exc_class()) as error:  # hand back, so nothing is lost
            if not isinstance(error, Exception) and is_asked_to_end(requests):
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
        """Deliver a message; return the problem of a dead letter, or None."""
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
                    f"the message was a dead letter {rounds} times: dead letters come back here"
                )
            with fail_after(_DEAD_WITHIN):
                await send(self._dead_letter, self._dead_engine, message.body or b"", options)
        except Exception as away:  # noqa: BLE001 - of a broker, or of its client
            log(
                logging.ERROR,
                "a dead letter was not accepted, so the message is handed back",
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
    with suppress(Exception):  # without a connection, the broker delivers the message again itself
        await message.nack()


def headers_of(message: Any) -> dict[str, str]:
    """Return the headers of a message as `str`, with `content-type`."""
    headers: Mapping[str, object] = message.headers
    texts = {name: value if type(value) is str else _text(value) for name, value in headers.items()}
    if message.content_type and "content-type" not in texts:  # RabbitMQ has it as a property
        texts["content-type"] = message.content_type
    return texts


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
