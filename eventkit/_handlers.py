"""Owns what a callable is: its name, where it stands, where its call starts, whether it fits.

Everything is looked at once, when subscribing. Knows nothing of event types and subscriptions.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from types import CodeType, EllipsisType
from typing import Any, cast

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from eventkit.exceptions import InvalidHandlerError

# A limiter of our own: slow handlers must not take the threads that sync endpoints need. One per
# running event loop, because a limiter belongs to the loop it is used in and a bus does not.
_limiter: RunVar[CapacityLimiter] = RunVar("eventkit_handler_threads")
_THREADS = 40

# Where a chain of `__wrapped__` and `__call__` is given up, because it may lead back to its start.
_MAX_LAYERS = 100

# Since 3.14 annotations are evaluated when looked at, and a name under TYPE_CHECKING cannot be.
_UNEVALUATED: dict[str, Any] = (  # Any: an option that earlier versions do not have
    {"annotation_format": import_module("annotationlib").Format.FORWARDREF}
    if sys.version_info >= (3, 14)
    else {}
)


@dataclass(frozen=True, slots=True)
class Handler:
    """A user's callable, looked at.

    Attributes:
        function: The callable as it was given.
        name: `module:qualname` of the callable, or the explicit name.
        location: Where it is defined, as `file:line`.
        in_thread: Its call starts in a worker thread.
        timeout: Seconds it may take, None for no limit, `...` for what the unit of work says.
    """

    function: Callable[..., object]
    name: str
    location: str
    in_thread: bool
    timeout: float | None | EllipsisType = field(default=...)

    @property
    def identity(self) -> object:
        """Equal for the same callable; a bound method is a new object on every access."""
        function = self.function
        if inspect.ismethod(function):
            return (id(function.__self__), id(function.__func__))
        if inspect.isbuiltin(function):  # bound too, and it compares by what it is bound to
            return function
        return id(function)

    async def start(self, event: object) -> Awaitable[object] | None:
        """Call the function where it belongs; what it returns to be awaited, is returned.

        Raises:
            InvalidHandlerError: It returned a generator, whose body nobody would run.
        """
        if self.in_thread:
            box = await to_thread.run_sync(_boxed, self.function, event, limiter=_threads())
            result = _unboxed(box)
        else:
            result = self.function(event)
        if result is None or inspect.isawaitable(result):
            return result
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            raise InvalidHandlerError(
                f"{self.name} ({self.location}) returned a generator, whose body nobody runs. "
                "Return None or an awaitable"
            )
        return None


# What a call in a worker thread returned, or what it raised; a list, so that it can be emptied.
_Box = list[tuple[object, BaseException | None]]


def _boxed(function: Callable[..., object], event: object) -> _Box:
    """Call it, and let nothing out of the thread but a box.

    Trio refuses a coroutine as a result. An exception would be kept alive, and the event with it,
    by those who carry it, because they stand in its traceback.
    """
    try:
        return [(function(event), None)]
    except BaseException as error:  # noqa: BLE001 - raised again where the thread is awaited
        return [(None, error)]


def _unboxed(box: _Box) -> object:
    result, error = box.pop()
    try:
        if error is not None:
            raise error
        return result
    finally:
        del error  # or this frame and its traceback keep each other alive


def _threads() -> CapacityLimiter:
    try:
        return _limiter.get()
    except LookupError:
        limiter = CapacityLimiter(_THREADS)
        _limiter.set(limiter)
        return limiter


def inspect_handler(
    function: Callable[..., object],
    *,
    name: str | None,
    timeout: float | None | EllipsisType,
    thread: bool | None,
) -> Handler:
    """Look at a callable, and refuse what could not work.

    Raises:
        InvalidHandlerError: Naming the function, its file and line, and what to change.
    """
    if not callable(function):
        raise InvalidHandlerError(f"a handler is a callable that takes the event, not {function!r}")
    called = name or _name(function)
    if isinstance(function, type):
        raise InvalidHandlerError(
            f"{called} is a class: every event would make an instance and nothing else. "
            "Subscribe an instance with __call__, or one of its methods"
        )
    location = _location(function)
    place = f"{called} ({location})"
    _refuse_generators(function, place)
    _check_signature(function, place)
    is_async = any(map(inspect.iscoroutinefunction, _layers(function)))
    if thread and any(map(inspect.iscoroutinefunction, _layers(function, wrapped=False))):
        raise InvalidHandlerError(
            f"{place} is async and runs on the event loop: remove thread=True"
        )
    in_thread = not is_async if thread is None else thread
    _check_timeout(timeout, place, in_thread=in_thread)
    return Handler(function, called, location, in_thread, timeout)


def _layers(
    function: Callable[..., object], *, wrapped: bool = True
) -> Iterator[Callable[..., object]]:
    """The callable and what calling it calls: of partials, methods, objects with `__call__`.

    With `wrapped` also what `functools.wraps` names, which is usually called too.
    """
    layer: object = function
    for _ in range(_MAX_LAYERS):
        if not callable(layer):
            return
        yield layer
        if isinstance(layer, functools.partial):
            layer = layer.func
        elif inspect.ismethod(layer):
            layer = layer.__func__
        elif wrapped and inspect.getattr_static(layer, "__wrapped__", None) is not None:
            layer = getattr(layer, "__wrapped__")  # noqa: B009 - typed as having none
        elif inspect.isroutine(layer):
            return
        else:
            layer = getattr(type(layer), "__call__", None)  # noqa: B004 - the class's, on purpose


def _name(function: Callable[..., object]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    named: object = function
    if not isinstance(getattr(function, "__qualname__", None), str):
        named = type(function)
    module = getattr(named, "__module__", None) or "builtins"  # methods of built-ins have none
    return f"{module}:{getattr(named, '__qualname__')}"  # noqa: B009 - typed as having none


def _location(function: Callable[..., object]) -> str:
    for layer in reversed(list(_layers(function))):
        code = getattr(layer, "__code__", None)
        if type(code) is CodeType:  # a mock's is only said to be one
            return f"{code.co_filename}:{code.co_firstlineno}"
    return "built in"


def _refuse_generators(function: Callable[..., object], place: str) -> None:
    for layer in _layers(function):
        if inspect.isasyncgenfunction(layer) or inspect.isgeneratorfunction(layer):
            raise InvalidHandlerError(
                f"{place} is a generator function: calling it runs none of its body. "
                "Remove the yield"
            )


def _check_signature(function: Callable[..., object], place: str) -> None:
    try:
        signature = inspect.signature(function, **_UNEVALUATED)
    except (TypeError, ValueError):  # built-ins may have none, others nonsense; the call will tell
        return
    try:
        bound = signature.bind(object())
    except TypeError:
        raise InvalidHandlerError(
            f"{place} cannot be called with just the event: its signature is {signature}. "
            "It needs one positional parameter for the event, and defaults for all others"
        ) from None
    for parameter in signature.parameters.values():
        marker = type(cast("object", parameter.default))
        if parameter.name not in bound.arguments and marker.__module__ == "fastapi.params":
            raise InvalidHandlerError(
                f"{place} declares {parameter.name}={marker.__name__}(...), which would arrive "
                "as that object: nothing resolves dependencies of handlers. Close over what the "
                "handler needs, or subscribe a method of an object that has it"
            )


def _check_timeout(timeout: float | None | EllipsisType, place: str, *, in_thread: bool) -> None:
    if timeout is None or timeout is ...:
        return
    if in_thread:
        raise InvalidHandlerError(
            f"{place} runs in a worker thread, which cannot be stopped: remove timeout=, or "
            "make it an async def"
        )
    if not is_duration(timeout):
        raise InvalidHandlerError(f"{place}: timeout= takes seconds above 0, not {timeout!r}")


def is_duration(seconds: object) -> bool:
    """Whether it is a number of seconds that something can take: above 0, and not NaN."""
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0
