"""Owns the facts about a handler's callable: its name, its place, and where its call starts.

A callable is inspected once, when it is subscribed. Knows nothing of event types, subscriptions
and containers: a `Resolver` provides the parameters beside the event.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib import import_module
from types import BuiltinFunctionType, CodeType, EllipsisType, FunctionType
from typing import Any, Protocol, cast

from eventkit._core.durable import Durable
from eventkit._core.threads import call_in_thread
from eventkit.exceptions import InvalidHandlerError

# Longest chain of `__wrapped__` and `__call__` that is followed: a chain may be a cycle.
_MAX_LAYERS = 100

# Types whose `==` says whether two callables are the same one.
_EQUAL_IF_SAME = {FunctionType, BuiltinFunctionType}

# Since 3.14 annotations are evaluated when they are read; a missing name gives a `ForwardRef`.
_UNEVALUATED: dict[str, Any] = (  # Any: an option that earlier versions do not have
    {"annotation_format": import_module("annotationlib").Format.FORWARDREF}
    if sys.version_info >= (3, 14)
    else {}
)

# Makes a context manager: in its block the time limit of the handler is suspended.
Untimed = Callable[[], AbstractContextManager[object]]


class Solver(Protocol):
    """Makes the dependencies of one handler for each delivery. `Resolver.compile` returns it.

        @asynccontextmanager
        async def solver(origin: object) -> AsyncIterator[Mapping[str, object]]:
            async with make_mailer() as mailer:
                yield {"mailer": mailer}

    Any callable with this signature is a solver.
    """

    def __call__(self, origin: object, /) -> AbstractAsyncContextManager[Mapping[str, object]]:
        """Return an async context manager that gives the dependencies, by parameter name.

        It is entered before the handler and left after it: on the event loop, in the task, the
        context variables and the unit of work of the delivery, and within its time limit. Its
        `__aexit__` gets the exception of the handler. If `__aexit__` raises, the delivery fails
        with that exception. If it suppresses the exception, the delivery fails all the same. The
        solver is called once for each delivery, also for several at the same time.

        Args:
            origin: The application that the unit of work was opened in, as an
                `eventkit.starlette.Origin`: for a request, a websocket, a lifespan, and all units
                inside these. None elsewhere.
        """
        ...


@dataclass(frozen=True, slots=True)
class Handler:
    """A user's callable, and the facts about it.

    The name is taken when the callable is inspected, so renaming the callable later has no effect.
    The parts of the name are stored, and joined when they are needed. A joined text would take as
    many bytes as everything else here.

    Attributes:
        function: The callable that was subscribed.
        module: Module of the callable; None if the handler has an explicit name.
        called: Qualified name of the callable in the module, or the explicit name.
        code: The code that a call runs; None for a built-in.
        in_thread: Whether the call starts in a worker thread.
        timeout: Time limit in seconds; None for no limit, `...` for that of the unit of work.
        solver: Makes the dependencies; None if there are none.
        direct: Whether a call only makes a coroutine, and nothing else has to be done, except for
            the dependencies.
        durable: Options of a durable handler; None if the deliveries are not stored.
    """

    function: Callable[..., Any]  # Any: the result of a call is checked at run time
    module: str | None
    called: str
    code: CodeType | None
    in_thread: bool
    timeout: float | None | EllipsisType = field(default=...)
    solver: Solver | None = None
    direct: bool = False
    durable: Durable | None = None

    @property
    def named(self) -> bool:
        """Whether the handler has an explicit name."""
        return self.module is None

    @property
    def name(self) -> str:
        """`module:qualname` of the callable, or the explicit name."""
        return self.called if self.module is None else f"{self.module}:{self.called}"

    @property
    def location(self) -> str:
        """Place where it is defined, as `file:line`."""
        return _place_of(self.code)

    @property
    def place(self) -> str:
        """The name, and the place where it is defined, for messages."""
        return f"{self.name} ({self.location})"

    @property
    def identity(self) -> object:
        """Equal for the same callable; a bound method is a new object on every access."""
        function = self.function
        if inspect.ismethod(function):
            return (id(function.__self__), id(function.__func__))
        if type(function) in _EQUAL_IF_SAME:
            return function
        return id(function)

    @property
    def defined_in(self) -> str:
        """The module of the callable, also if the handler has an explicit name."""
        return self.module or _module_and_name(self.function)[0]

    def comes_again(self, other: Handler) -> bool:
        """Whether both handlers come from the same lines of a file that was executed twice.

        A file is executed twice by a reload, and if it is imported under two names. Functions that
        a loop or a closure makes of the same lines share one code object. A second execution makes
        a new code object.
        """
        code, before = self.code, other.code
        if code is before or code is None or before is None:
            return False
        return (
            code.co_firstlineno == before.co_firstlineno
            and code.co_qualname == before.co_qualname
            and _are_same_file(code.co_filename, before.co_filename)
            and not code.co_filename.startswith("<")  # not from a file, for example from `exec`
            and (code.co_name != "<lambda>" or code == before)  # a line may have several
        )

    async def start(
        self, event: object, origin: object, untimed: Untimed = nullcontext
    ) -> Awaitable[object] | None:
        """Call the function on the event loop or in a thread; return the awaitable that is left.

        With dependencies, everything is in the awaitable: making them, the call, and the clean-up.
        A thread cannot be stopped, so `untimed` surrounds a call in a thread.

        Raises:
            InvalidHandlerError: It returned a generator, and nobody would run its body.
        """
        try:
            if self.solver is not None:
                return self.with_dependencies(self.solver, origin, event, untimed)
            if self.in_thread:
                result = await call_in_thread(self.function, event)
            else:
                result = self.function(event)
        finally:
            del event  # otherwise a traceback with local variables would show the payload
        if result is None or inspect.isawaitable(result):
            return result
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            raise InvalidHandlerError(
                f"{self.place} returned a generator, and nobody runs the body of a generator. "
                "Return None or an awaitable"
            )
        return None

    async def with_dependencies(
        self, solver: Solver, origin: object, event: object, untimed: Untimed = nullcontext
    ) -> None:
        """Make the dependencies, run the function to its end, and clean up, in that order."""
        failure: BaseException | None = None
        try:
            async with solver(origin) as values:
                try:
                    function = functools.partial(self.function, **values)
                    if self.direct:
                        await cast("Awaitable[object]", function(event))
                        return
                    bare = Handler(function, self.module, self.called, self.code, self.in_thread)
                    with untimed() if self.in_thread else nullcontext():
                        awaitable = await bare.start(event, origin)
                    if awaitable is not None:
                        await awaitable
                except BaseException as error:
                    failure = error
                    raise
            if failure is not None:  # a dependency suppressed it, but the delivery has failed
                raise failure
        finally:
            del failure  # otherwise this frame and its traceback keep each other alive
            del event  # as in `start`


def inspect_handler(
    function: Callable[..., object],
    *,
    name: str | None,
    timeout: float | None | EllipsisType,
    thread: bool | None,
    durable: Durable | None = None,
) -> Handler:
    """Inspect a callable, and refuse one that cannot work as a handler.

    Raises:
        InvalidHandlerError: The message names the function, its file and line, and the remedy.
    """
    if not callable(function):
        hint = ". Pass the function without calling it" if inspect.iscoroutine(function) else ""
        raise InvalidHandlerError(
            f"a handler is a callable that takes the event, not {function!r}{hint}"
        )
    module, called = (None, name) if name else _module_and_name(function)
    is_async = any(map(inspect.iscoroutinefunction, layers(function)))
    in_thread = not is_async if thread is None else thread
    direct = timeout is ... and _makes_coroutine(function)
    code = _code_of(function)
    handler = Handler(
        function, module, called, code, in_thread, timeout, direct=direct, durable=durable
    )
    if isinstance(function, type):
        raise InvalidHandlerError(
            f"{handler.name} is a class: an event would only create an instance of it. Subscribe "
            "an instance with __call__, or a method of an instance"
        )
    _refuse_generators(handler)
    _check_signature(handler)
    if thread and any(map(inspect.iscoroutinefunction, layers(function, wrapped=False))):
        raise InvalidHandlerError(
            f"{handler.place} is async and runs on the event loop: remove thread=True"
        )
    _check_timeout(handler)
    if durable is not None:
        _refuse_unstable_name(handler)
    return handler


def _makes_coroutine(function: Callable[..., object]) -> bool:
    """Whether a call only makes a coroutine. Not for callables that are only marked as async."""
    plain = type(function) is functools.partial  # a subclass may do anything in its `__call__`
    if isinstance(function, functools.partial):
        return plain and _makes_coroutine(function.func)
    called: object = function
    if not isinstance(called, FunctionType) and not inspect.ismethod(called):
        called = getattr(type(called), "__call__", None)  # noqa: B004 - that of the class is used
    if inspect.ismethod(called):
        called = called.__func__
    return isinstance(called, FunctionType) and inspect.CO_COROUTINE & called.__code__.co_flags != 0


def layers(
    function: Callable[..., object], *, wrapped: bool = True
) -> Iterator[Callable[..., object]]:
    """The callable, and the callables inside it: in partials, methods, objects with `__call__`.

    With `wrapped`, also the function that `functools.wraps` names. A call usually reaches it, too.
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
        elif wrapped and _is_wrapper(layer):
            layer = getattr(layer, "__wrapped__")  # noqa: B009 - its type has no such attribute
        elif inspect.isroutine(layer):
            return
        else:
            layer = getattr(type(layer), "__call__", None)  # noqa: B004 - that of the class is used


def _is_wrapper(layer: Callable[..., object]) -> bool:
    """Whether `functools.wraps` has set `__wrapped__`; some objects have every attribute."""
    # For a function, `getattr_static` would create the `__dict__`, 64 bytes that it can do without.
    look_up = getattr if type(layer) is FunctionType else inspect.getattr_static
    return look_up(layer, "__wrapped__", None) is not None


def name_of(function: Callable[..., object]) -> str:
    """The name of a callable: `module:qualname`; for a partial, that of the function inside."""
    return ":".join(_module_and_name(function))


def _are_same_file(one: str, other: str) -> bool:
    """Whether two paths are the same file, also if one is relative or a link."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _module_and_name(function: Callable[..., object]) -> tuple[str, str]:
    while isinstance(function, functools.partial):
        function = function.func
    named: object = function
    if not isinstance(getattr(function, "__qualname__", None), str):
        named = type(function)
    module = getattr(named, "__module__", None) or "builtins"  # methods of built-ins have none
    return module, getattr(named, "__qualname__")  # noqa: B009 - its type has no such attribute


def location_of(function: Callable[..., object]) -> str:
    """Place where a callable is defined, as `file:line`."""
    return _place_of(_code_of(function))


def _code_of(function: Callable[..., object]) -> CodeType | None:
    """The code object of the innermost function of a call; None if it is not written in Python."""
    for layer in reversed(list(layers(function))):
        code = getattr(layer, "__code__", None)
        if type(code) is CodeType:  # `isinstance` would be true for some mocks
            return code
    return None


def _place_of(code: CodeType | None) -> str:
    return "built in" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _refuse_generators(handler: Handler) -> None:
    for layer in layers(handler.function):
        if inspect.isasyncgenfunction(layer) or inspect.isgeneratorfunction(layer):
            raise InvalidHandlerError(
                f"{handler.place} is a generator function: calling it runs none of its body. "
                "Remove the yield"
            )


def _check_signature(handler: Handler) -> None:
    """Refuse a callable that takes no event. The other parameters are checked with the bus."""
    if takes_the_event_alone(handler.function):
        return
    signature = signature_of(handler.function)
    if signature is None:
        _check_annotations(handler)
        return
    try:
        signature.bind_partial(object())
    except TypeError:
        remedy = "It needs a positional parameter for the event"
    else:
        first, *others = signature.parameters.values()
        if first.name != "self" or not any(map(is_required, others)):
            return
        remedy = "It is a method of a class: subscribe the method of an instance"
    raise InvalidHandlerError(
        f"{handler.place} cannot be called with an event: its signature is {signature}. {remedy}"
    )


def _check_annotations(handler: Handler) -> None:
    """Refuse an annotation that raises. Before Python 3.14 it raises at the definition."""
    if sys.version_info >= (3, 14):
        from annotationlib import Format, get_annotations

        for layer in layers(handler.function):
            if isinstance(layer, FunctionType):
                try:
                    get_annotations(layer, format=Format.FORWARDREF)
                except Exception as error:
                    raise InvalidHandlerError(
                        f"{handler.place}: an annotation cannot be evaluated: {error!r}. Correct "
                        "the annotation"
                    ) from error


def takes_the_event_alone(function: Callable[..., object]) -> bool:
    """Whether it is a plain function with exactly one parameter, as most handlers are.

    Then its signature is not needed. Making a signature takes most of the time of subscribing, and
    leaves a dictionary of annotations at the function: 184 bytes.
    """
    if type(function) is not FunctionType or _is_wrapper(function):
        return False
    code = function.__code__
    return (
        (code.co_argcount, code.co_kwonlyargcount) == (1, 0)
        and not code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
        and not hasattr(function, "__signature__")
    )


def signature_of(
    function: Callable[..., object], *, follow_wrapped: bool = True
) -> inspect.Signature | None:
    """The signature, with annotations that are not evaluated; None if there is none.

    Built-ins may have no signature, and other objects a wrong one. Then only a call shows it.
    """
    with suppress(Exception):  # annotations are user code, and evaluating one may raise
        return inspect.signature(function, follow_wrapped=follow_wrapped, **_UNEVALUATED)
    return None


STARS = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in STARS


def _check_timeout(handler: Handler) -> None:
    timeout = handler.timeout
    if timeout is None or timeout is ...:
        return
    if handler.in_thread:
        raise InvalidHandlerError(
            f"{handler.place} runs in a worker thread, which cannot be stopped: remove "
            "timeout=, or make the handler an async def"
        )
    if not is_duration(timeout):
        raise InvalidHandlerError(
            f"{handler.place}: timeout= takes seconds above 0, not {timeout!r}"
        )


def _refuse_unstable_name(handler: Handler) -> None:
    """Refuse a durable handler whose name may be different in another process."""
    function = handler.function
    if handler.named:
        return
    if isinstance(function, functools.partial):
        kind = "a partial"
    elif "<lambda>" in handler.called:
        kind = "a lambda"
    elif "<locals>" in handler.called:
        kind = "defined in a function"
    elif not inspect.isroutine(function):
        kind = "an object with __call__"
    else:
        return
    raise InvalidHandlerError(
        f"{handler.place} is durable and {kind}: stored deliveries find their handler by its name, "
        "also in another process. Give it a name that never changes: name='shop:receipt'"
    )


def is_duration(seconds: object) -> bool:
    """Whether it is a number of seconds above 0, and not NaN."""
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0
