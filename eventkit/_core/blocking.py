"""Owns the warning about handlers that block the event loop, in debug mode."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from time import perf_counter
from typing import Any, cast

from eventkit._core.handlers import Handler, Solver
from eventkit._core.log import log

# Longest step on the event loop without a warning; asyncio's debug mode has the same limit.
_BLOCKING_SECONDS = 0.1


def timed(handler: Handler) -> Handler:
    """The same handler, with a warning in the log if it blocks the event loop.

    The steps of the handler and of its dependencies on the event loop are timed. A step goes from
    one wait to the next. A call in a worker thread does not block the loop and is not timed.
    """
    watch = _Watch(handler)
    function = handler.function if handler.in_thread else _Timed(handler.function, watch)
    solver = handler.solver and functools.partial(_TimedSolution, handler.solver, watch)
    return replace(handler, function=function, solver=solver)


class _Watch:
    """Times the steps of one handler, and warns once if a step takes too long."""

    __slots__ = ("_handler", "_told")

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._told = False

    def step(self, step: Callable[..., Any], *arguments: object) -> Any:  # Any: its result
        """Take one step, and time it."""
        begun = perf_counter()
        try:
            return step(*arguments)
        finally:
            seconds = perf_counter() - begun
            if seconds >= _BLOCKING_SECONDS and not self._told:
                self._told = True
                log(
                    logging.WARNING,
                    "a handler blocked the event loop: make it a plain def, which runs in a "
                    "thread, or have it await what takes long",
                    handler=self._handler.name,
                    location=self._handler.location,
                    seconds=round(seconds, 3),
                )
            # Otherwise this frame and the traceback of an exception in `arguments` keep each other
            # alive, and a traceback with local variables would show the payload.
            del arguments


class _Timed:
    """A handler's function. Its call is timed, and also the steps of its coroutine."""

    def __init__(self, function: Callable[..., object], watch: _Watch) -> None:
        self.__wrapped__ = function
        self._watch = watch

    def __call__(self, event: object, /, **values: object) -> object:
        try:
            call = functools.partial(self.__wrapped__, **values)
            return _steps_of(self._watch.step(call, event), self._watch)
        finally:
            del event, values  # as in `step`


class _TimedSolution(AbstractAsyncContextManager[Mapping[str, object]]):
    """The dependencies of one delivery. The steps to make them and to clean up are timed."""

    __slots__ = ("_inner", "_watch")

    def __init__(self, solver: Solver, watch: _Watch, origin: object) -> None:
        self._inner = solver(origin)
        self._watch = watch

    async def __aenter__(self) -> Mapping[str, object]:
        values: Mapping[str, object] = await _steps_of(self._inner.__aenter__(), self._watch)
        return values

    async def __aexit__(self, *raised: Any) -> bool | None:
        try:
            swallowed: bool | None = await _steps_of(self._inner.__aexit__(*raised), self._watch)
            return swallowed
        finally:
            del raised  # otherwise this frame and its traceback keep each other alive


def _steps_of(result: object, watch: _Watch) -> Any:  # Any: the result of a handler
    """The same coroutine with timed steps; any other object unchanged."""
    if isinstance(result, Coroutine):
        return _Steps(cast("Coroutine[object, Any, object]", result), watch)
    return result


class _Steps(Coroutine[Any, Any, Any]):  # Any: objects of the event loop pass through
    """A coroutine with timed steps."""

    __slots__ = ("_coroutine", "_watch")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], watch: _Watch) -> None:
        self._coroutine = coroutine
        self._watch = watch

    def send(self, value: Any) -> Any:
        try:
            return self._watch.step(self._coroutine.send, value)
        finally:
            del value  # on trio it may hold an exception

    def throw(self, *error: Any) -> Any:
        try:
            return self._watch.step(self._coroutine.throw, *error)
        finally:
            del error  # otherwise this frame and its traceback keep each other alive

    def close(self) -> None:
        self._watch.step(self._coroutine.close)

    def __await__(self) -> Generator[Any, Any, Any]:
        return cast("Generator[Any, Any, Any]", self)

    def __next__(self) -> Any:
        return self.send(None)

    @property
    def cr_frame(self) -> object:
        """The frame of the coroutine, for messages with the line at which it waits."""
        return getattr(self._coroutine, "cr_frame", None)

    @property
    def cr_await(self) -> object:
        """The object that the coroutine awaits."""
        return getattr(self._coroutine, "cr_await", None)
