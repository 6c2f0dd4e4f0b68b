"""Owns what a callable is: its name, its place, and where its call starts.

Everything is looked at once, when subscribing. Knows nothing of event types and subscriptions, and
of no container: whoever fills the parameters beside the event is a `Resolver`.
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

# Where a chain of `__wrapped__` and `__call__` is given up, because it may lead back to its start.
_MAX_LAYERS = 100

# Equal only if they are the same; built-in methods, which are bound too, if their objects are.
_EQUAL_IF_SAME = {FunctionType, BuiltinFunctionType}

# Since 3.14 annotations are evaluated when looked at; a name that does not exist is a `ForwardRef`.
_UNEVALUATED: dict[str, Any] = (  # Any: an option that earlier versions do not have
    {"annotation_format": import_module("annotationlib").Format.FORWARDREF}
    if sys.version_info >= (3, 14)
    else {}
)

# Makes a block in which a handler's time does not pass.
Untimed = Callable[[], AbstractContextManager[object]]


class Solver(Protocol):
    """Makes the dependencies of one handler, for one delivery. What `Resolver.compile` returns."""

    def __call__(self, origin: object, /) -> AbstractAsyncContextManager[Mapping[str, object]]:
        """Return what is entered around the call; the handler is given the values by name.

        It is entered and left on the event loop, in the task, the context variables and the unit
        of work of the delivery, within its deadline. Its exit is told what the handler raised:
        what the exit raises instead fails the delivery, what it swallows fails it all the same.
        Deliveries at the same time each call it.

        Args:
            origin: Where the unit of work was opened: an `eventkit.starlette.Origin` for one of a
                request, a websocket or a lifespan and all inside it, None elsewhere.
        """
        ...


@dataclass(frozen=True, slots=True)
class Handler:
    """A user's callable, looked at.

    What it is called is kept as it was then, so that renaming the callable later changes no name
    that was told. It is kept as the parts that the callable has anyway, and put together when
    asked: each text would take as many bytes as all else here.

    Attributes:
        function: The callable as it was given.
        module: The module of the callable; None where it was given an explicit name.
        called: Its qualified name in the module, or the explicit name.
        code: What is run; None for what is built in.
        in_thread: Its call starts in a worker thread.
        timeout: Seconds it may take, None for no limit, `...` for what the unit of work says.
        solver: Makes its dependencies; None where it has none.
        direct: Calling it does nothing but make a coroutine, and that is all there is to do, but
            for its dependencies.
        durable: How its deliveries are kept; None where they are not.
    """

    function: Callable[..., Any]  # Any: what a call gives is looked at when it is there
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
        """Whether the name is an explicit one."""
        return self.module is None

    @property
    def name(self) -> str:
        """`module:qualname` of the callable, or the explicit name."""
        return self.called if self.module is None else f"{self.module}:{self.called}"

    @property
    def location(self) -> str:
        """Where it is defined, as `file:line`."""
        return _place_of(self.code)

    @property
    def place(self) -> str:
        """What it is called, and where it is defined."""
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
        """The module whose code it is, also where it has an explicit name."""
        return self.module or _module_and_name(self.function)[0]

    def comes_again(self, other: Handler) -> bool:
        """Whether the other one is of the same lines of a file, which has run again since.

        So it is after a reload, and where a file is imported by a second name. Functions that a
        loop or a closure makes of the same lines share their code; a second run makes it anew.
        """
        code, before = self.code, other.code
        if code is before or code is None or before is None:
            return False
        return (
            code.co_firstlineno == before.co_firstlineno
            and code.co_qualname == before.co_qualname
            and _are_same_file(code.co_filename, before.co_filename)
            and not code.co_filename.startswith("<")  # of texts that are executed, and of no file
            and (code.co_name != "<lambda>" or code == before)  # a line may have several
        )

    async def start(
        self, event: object, origin: object, untimed: Untimed = nullcontext
    ) -> Awaitable[object] | None:
        """Call the function where it belongs; what it returns to be awaited, is returned.

        With dependencies all of it is to be awaited: making them, the call, and their clean-up.
        A thread cannot be stopped: around a call in one, `untimed` is entered.

        Raises:
            InvalidHandlerError: It returned a generator, whose body nobody would run.
        """
        try:
            if self.solver is not None:
                return self.with_dependencies(self.solver, origin, event, untimed)
            if self.in_thread:
                result = await call_in_thread(self.function, event)
            else:
                result = self.function(event)
        finally:
            del event  # or a traceback that shows local variables shows the payload
        if result is None or inspect.isawaitable(result):
            return result
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            raise InvalidHandlerError(
                f"{self.place} returned a generator, whose body nobody runs. Return None or an "
                "awaitable"
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
            if failure is not None:  # a dependency swallowed it, which makes nothing good
                raise failure
        finally:
            del failure  # or this frame and its traceback keep each other alive
            del event  # as in `start`


def inspect_handler(
    function: Callable[..., object],
    *,
    name: str | None,
    timeout: float | None | EllipsisType,
    thread: bool | None,
    durable: Durable | None = None,
) -> Handler:
    """Look at a callable, and refuse what could not work.

    Raises:
        InvalidHandlerError: Naming the function, its file and line, and what to change.
    """
    if not callable(function):
        hint = ". It was called already: pass the function" if inspect.iscoroutine(function) else ""
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
            f"{handler.name} is a class: every event would make an instance and nothing else. "
            "Subscribe an instance with __call__, or one of its methods"
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
    """Whether a call runs none of its body: not so of what is merely wrapped or marked as async."""
    plain = type(function) is functools.partial  # a subclass may call it as it likes
    if isinstance(function, functools.partial):
        return plain and _makes_coroutine(function.func)
    called: object = function
    if not isinstance(called, FunctionType) and not inspect.ismethod(called):
        called = getattr(type(called), "__call__", None)  # noqa: B004 - the class's, on purpose
    if inspect.ismethod(called):
        called = called.__func__
    return isinstance(called, FunctionType) and inspect.CO_COROUTINE & called.__code__.co_flags != 0


def layers(
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
        elif wrapped and _is_wrapper(layer):
            layer = getattr(layer, "__wrapped__")  # noqa: B009 - typed as having none
        elif inspect.isroutine(layer):
            return
        else:
            layer = getattr(type(layer), "__call__", None)  # noqa: B004 - the class's, on purpose


def _is_wrapper(layer: Callable[..., object]) -> bool:
    """Whether `functools.wraps` has named what it wraps; some objects have any attribute."""
    # To look statically makes a function's `__dict__`, 64 bytes that most of them do without.
    look_up = getattr if type(layer) is FunctionType else inspect.getattr_static
    return look_up(layer, "__wrapped__", None) is not None


def name_of(function: Callable[..., object]) -> str:
    """What a callable is called: `module:qualname`, of the function inside a partial."""
    return ":".join(_module_and_name(function))


def _are_same_file(one: str, other: str) -> bool:
    """Also where a script was named with detours or by a link."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _module_and_name(function: Callable[..., object]) -> tuple[str, str]:
    while isinstance(function, functools.partial):
        function = function.func
    named: object = function
    if not isinstance(getattr(function, "__qualname__", None), str):
        named = type(function)
    module = getattr(named, "__module__", None) or "builtins"  # methods of built-ins have none
    return module, getattr(named, "__qualname__")  # noqa: B009 - typed as having none


def location_of(function: Callable[..., object]) -> str:
    """Where a callable is defined, as `file:line`."""
    return _place_of(_code_of(function))


def _code_of(function: Callable[..., object]) -> CodeType | None:
    """The code that a call comes to in the end; None where that is not Python's."""
    for layer in reversed(list(layers(function))):
        code = getattr(layer, "__code__", None)
        if type(code) is CodeType:  # a mock's is only said to be one
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
    """Refuse what takes no event; whether the rest has a source, depends on the bus."""
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
        remedy = "It is a method: subscribe that of an instance, once there is one"
    raise InvalidHandlerError(
        f"{handler.place} cannot be called with an event: its signature is {signature}. {remedy}"
    )


def _check_annotations(handler: Handler) -> None:
    """Refuse an annotation that raises. Before 3.14 it does so where the function is defined."""
    if sys.version_info >= (3, 14):
        from annotationlib import Format, get_annotations

        for layer in layers(handler.function):
            if isinstance(layer, FunctionType):
                try:
                    get_annotations(layer, format=Format.FORWARDREF)
                except Exception as error:
                    raise InvalidHandlerError(
                        f"{handler.place}: an annotation cannot be evaluated: {error!r}"
                    ) from error


def takes_the_event_alone(function: Callable[..., object]) -> bool:
    """Whether it is a function of one parameter, as most handlers are, and is called as such.

    Then nobody needs its signature. To make one takes most of the time of subscribing, and leaves
    the function with a dictionary of its annotations, 184 bytes.
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
    """The signature with its annotations as they stand; None where the call has to tell.

    Built-ins may have none, others nonsense.
    """
    with suppress(Exception):  # to evaluate annotations is to run what users wrote
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
            "timeout=, or make it an async def"
        )
    if not is_duration(timeout):
        raise InvalidHandlerError(
            f"{handler.place}: timeout= takes seconds above 0, not {timeout!r}"
        )


def _refuse_unstable_name(handler: Handler) -> None:
    """Refuse a durable handler that another process would not find by its name."""
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
        f"{handler.place} is durable and {kind}: deliveries that are kept find their handler by "
        "its name, in another process, too. Give it a name that stays: name='shop:receipt'"
    )


def is_duration(seconds: object) -> bool:
    """Whether it is a number of seconds that something can take: above 0, and not NaN."""
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0
