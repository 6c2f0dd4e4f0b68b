"""Owns what a callable is: its name, its place, where its call starts, what it takes beside events.

Everything is looked at once, when subscribing. Knows nothing of event types and subscriptions, and
of no container: whoever fills the parameters beside the event is a `Resolver`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from importlib import import_module
from time import perf_counter
from types import BuiltinFunctionType, CodeType, EllipsisType, FunctionType
from typing import Any, ForwardRef, Protocol, cast, runtime_checkable

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from eventkit._log import log
from eventkit.exceptions import InvalidHandlerError

# A limiter of our own: slow handlers must not take the threads that sync endpoints need. One per
# running event loop, because a limiter belongs to the loop it is used in and a bus does not.
# And one per level of nesting: a thread that waits for other handlers must not hold a token that
# they need.
_limiters: RunVar[list[CapacityLimiter]] = RunVar("eventkit_handler_threads")
thread_level: ContextVar[int] = ContextVar("eventkit_thread_level", default=0)
_THREADS = 40

# A step on the event loop that takes longer is too long; asyncio's debug mode has the same limit.
_BLOCKING_SECONDS = 0.1

# Where a chain of `__wrapped__` and `__call__` is given up, because it may lead back to its start.
_MAX_LAYERS = 100

# Equal only if they are the same; built-in methods, which are bound too, if their objects are.
_EQUAL_IF_SAME = {FunctionType, BuiltinFunctionType}

# Since 3.14 annotations are evaluated when looked at, and a name under TYPE_CHECKING cannot be.
_UNEVALUATED: dict[str, Any] = (  # Any: an option that earlier versions do not have
    {"annotation_format": import_module("annotationlib").Format.FORWARDREF}
    if sys.version_info >= (3, 14)
    else {}
)


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


@runtime_checkable
class Resolver(Protocol):
    """What gives handlers their dependencies: FastAPI where nothing is said, or another container.

    Asked when a handler is subscribed to a bus, or its router is included in one; afterwards only
    the `Solver` is called. It is shown the parameters beside the event, with annotations that have
    been evaluated: a name that does not exist at run time is a `typing.ForwardRef` in them, and
    one that cannot be evaluated at all is a string.
    """

    def provides(self, parameter: inspect.Parameter) -> bool:
        """Say whether this is a dependency. Others keep their default, and have to have one."""
        ...

    def compile(self, parameters: Sequence[inspect.Parameter]) -> Solver:
        """Prepare for the deliveries to a handler that has these dependencies, one at least.

        Raises:
            Exception: What cannot work. The handler's name and place are added to the message.
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
    """

    function: Callable[..., Any]  # Any: what a call gives is looked at when it is there
    module: str | None
    called: str
    code: CodeType | None
    in_thread: bool
    timeout: float | None | EllipsisType = field(default=...)
    solver: Solver | None = None
    direct: bool = False

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
            and code.co_filename == before.co_filename
            and code.co_qualname == before.co_qualname
            and not code.co_filename.startswith("<")  # of texts that are executed, and of no file
            and (code.co_name != "<lambda>" or code == before)  # a line may have several
        )

    async def start(self, event: object, origin: object) -> Awaitable[object] | None:
        """Call the function where it belongs; what it returns to be awaited, is returned.

        With dependencies all of it is to be awaited: making them, the call, and their clean-up.

        Raises:
            InvalidHandlerError: It returned a generator, whose body nobody would run.
        """
        try:
            if self.solver is not None:
                whole = self.with_dependencies(self.solver, origin, event)
                if not self.in_thread:
                    return whole
                await whole  # a thread has no deadline, and so neither has what it needs
                return None
            if self.in_thread:
                box = await to_thread.run_sync(_boxed, self.function, event, limiter=_threads())
                result = _unboxed(box)
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

    async def with_dependencies(self, solver: Solver, origin: object, event: object) -> None:
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


def timed(handler: Handler) -> Handler:
    """The same handler, which says in the log if it blocks the event loop. For debug mode.

    Its steps on the event loop are timed, those of its dependencies too: from where the loop goes
    on with it to where it waits again. A call in a worker thread blocks nobody and is not timed.
    """
    watch = _Watch(handler)
    function = handler.function if handler.in_thread else _Timed(handler.function, watch)
    solver = handler.solver and functools.partial(_TimedSolution, handler.solver, watch)
    return replace(handler, function=function, solver=solver)


class _Watch:
    """Knows whose steps they are, and warns of the first one that takes too long."""

    __slots__ = ("_handler", "_told")

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._told = False

    def step(self, step: Callable[..., Any], *arguments: object) -> Any:  # Any: what it gives
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
            # Or this frame and the traceback of an exception in them keep each other alive, and a
            # traceback that shows local variables shows the payload.
            del arguments


class _Timed:
    """A handler's function whose call is timed, and the steps of the coroutine that it makes."""

    def __init__(self, function: Callable[..., object], watch: _Watch) -> None:
        self.__wrapped__ = function
        self._watch = watch

    def __call__(self, event: object, /, **values: object) -> object:
        call = functools.partial(self.__wrapped__, event, **values)
        del event, values  # as in `step`
        return _steps_of(self._watch.step(call), self._watch)


class _TimedSolution(AbstractAsyncContextManager[Mapping[str, object]]):
    """The dependencies of one delivery: to make them, and to clean them up, takes timed steps."""

    __slots__ = ("_inner", "_watch")

    def __init__(self, solver: Solver, watch: _Watch, origin: object) -> None:
        self._inner = solver(origin)
        self._watch = watch

    def __aenter__(self) -> Coroutine[Any, Any, Mapping[str, object]]:
        return cast("_Steps", _steps_of(self._inner.__aenter__(), self._watch))

    def __aexit__(self, *raised: Any) -> Coroutine[Any, Any, bool | None]:
        return cast("_Steps", _steps_of(self._inner.__aexit__(*raised), self._watch))


def _steps_of(result: object, watch: _Watch) -> object:
    """The same coroutine with timed steps; what else there may be, and be awaited, as it is."""
    return _Steps(result, watch) if isinstance(result, Coroutine) else result


class _Steps(Coroutine[Any, Any, Any]):  # Any: what passes through is the event loop's
    """A coroutine each of whose steps is timed."""

    __slots__ = ("_coroutine", "_watch")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], watch: _Watch) -> None:
        self._coroutine = coroutine
        self._watch = watch

    def send(self, value: Any) -> Any:
        try:
            return self._watch.step(self._coroutine.send, value)
        finally:
            del value  # on trio an exception may be in it

    def throw(self, *error: Any) -> Any:
        try:
            return self._watch.step(self._coroutine.throw, *error)
        finally:
            del error  # or this frame and its traceback keep each other alive

    def close(self) -> None:
        self._watch.step(self._coroutine.close)

    def __await__(self) -> Generator[Any, Any, Any]:
        return cast("Generator[Any, Any, Any]", self)

    def __next__(self) -> Any:
        return self.send(None)

    @property
    def cr_frame(self) -> object:
        """Its frame, for messages that say where it waits."""
        return getattr(self._coroutine, "cr_frame", None)

    @property
    def cr_await(self) -> object:
        """What it awaits."""
        return getattr(self._coroutine, "cr_await", None)


# What a call in a worker thread returned, or what it raised; a list, so that it can be emptied.
_Box = list[tuple[object, BaseException | None]]


def _boxed(function: Callable[..., object], event: object) -> _Box:
    """Call it, and let nothing out of the thread but a box.

    Trio refuses a coroutine as a result. An exception would be kept alive, and the event with it,
    by those who carry it, because they stand in its traceback.
    """
    thread_level.set(thread_level.get() + 1)
    try:
        return [(function(event), None)]
    except BaseException as error:  # noqa: BLE001 - raised again where the thread is awaited
        return [(None, error)]
    finally:
        del event  # as in `start`


def _unboxed(box: _Box) -> object:
    result, error = box.pop()
    try:
        if error is not None:
            raise error
        return result
    finally:
        del error  # or this frame and its traceback keep each other alive


def _threads() -> CapacityLimiter:
    """The limiter of the caller's level of nesting, on the caller's event loop."""
    try:
        limiters = _limiters.get()
    except LookupError:
        limiters = list[CapacityLimiter]()
        _limiters.set(limiters)
    while len(limiters) <= thread_level.get():
        limiters.append(CapacityLimiter(_THREADS))
    return limiters[thread_level.get()]


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
        hint = ". It was called already: pass the function" if inspect.iscoroutine(function) else ""
        raise InvalidHandlerError(
            f"a handler is a callable that takes the event, not {function!r}{hint}"
        )
    module, called = (None, name) if name else _module_and_name(function)
    is_async = any(map(inspect.iscoroutinefunction, layers(function)))
    in_thread = not is_async if thread is None else thread
    direct = timeout is ... and _makes_coroutine(function)
    code = _code_of(function)
    handler = Handler(function, module, called, code, in_thread, timeout, direct=direct)
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
    if _takes_the_event_alone(handler.function):
        return
    signature = _signature(handler.function)
    if signature is None:
        return
    try:
        signature.bind_partial(object())
    except TypeError:
        remedy = "It needs a positional parameter for the event"
    else:
        first, *others = signature.parameters.values()
        if first.name != "self" or not any(map(_is_required, others)):
            return
        remedy = "It is a method: subscribe that of an instance, once there is one"
    raise InvalidHandlerError(
        f"{handler.place} cannot be called with an event: its signature is {signature}. {remedy}"
    )


def _takes_the_event_alone(function: Callable[..., object]) -> bool:
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


def _signature(
    function: Callable[..., object], *, follow_wrapped: bool = True
) -> inspect.Signature | None:
    """The signature with its annotations as they stand; None where the call has to tell.

    Built-ins may have none, others nonsense.
    """
    try:
        return inspect.signature(function, follow_wrapped=follow_wrapped, **_UNEVALUATED)
    except (TypeError, ValueError):
        return None


_STARS = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in _STARS


def with_dependencies(handler: Handler, resolver: Resolver | None) -> Handler:
    """Have the resolver compile what the handler takes beside the event.

    Without a resolver FastAPI's is used, which is not imported before a handler needs it.

    Raises:
        InvalidHandlerError: Something that it takes has neither a source nor a default.
    """
    parameters = _beside_the_event(handler.function)
    required = [parameter for parameter in parameters if _is_required(parameter)]
    # What FastAPI has to fill is an object of FastAPI's, or has no default.
    if resolver is None and parameters and (required or "fastapi" in sys.modules):
        resolver = _of_fastapi(handler, [parameter.name for parameter in required or parameters])
    if resolver is None:
        return handler
    provided = [parameter for parameter in parameters if resolver.provides(parameter)]
    for parameter in required:
        if parameter not in provided:
            raise InvalidHandlerError(_unprovided(handler, parameter))
    if not provided:
        return handler
    try:
        solver = resolver.compile(provided)
    except Exception as error:
        raise InvalidHandlerError(f"{handler.place}: {error}") from error
    _check_call(handler, provided)
    return replace(handler, solver=solver)


def _beside_the_event(function: Callable[..., object]) -> list[inspect.Parameter]:
    """What it takes beside the event and what a partial has bound, with annotations evaluated."""
    signature = None if _takes_the_event_alone(function) else _signature(function)
    if signature is None:
        return []
    called = list(layers(function))
    bound = {
        name for layer in called if isinstance(layer, functools.partial) for name in layer.keywords
    }
    functions = [layer for layer in called if isinstance(layer, FunctionType)]
    namespace = functions[-1].__globals__ if functions else {}
    return [
        parameter.replace(annotation=_evaluated(parameter.annotation, namespace))
        for parameter in list(signature.parameters.values())[1:]
        if parameter.name not in bound and parameter.kind not in _STARS
    ]


def _evaluated(annotation: object, namespace: dict[str, Any]) -> object:
    """Evaluate a postponed annotation; names for type checkers alone become a `ForwardRef`.

    What cannot be evaluated even so, stays the text that it is.
    """
    missing: dict[str, object] = {}
    while isinstance(annotation, str):
        try:
            annotation = eval(annotation, namespace, missing)
        except Exception as error:  # noqa: BLE001 - whatever stands there is user code
            name = error.name if isinstance(error, NameError) else None
            if name is None or name in missing:
                break
            missing[name] = ForwardRef(name)
    return annotation


def _of_fastapi(handler: Handler, parameters: Sequence[str]) -> Resolver:
    """FastAPI's resolver. The one place that knows of it; by name, as it stands floors above."""
    try:
        module = import_module("eventkit.fastapi")
    except ModuleNotFoundError as error:
        raise InvalidHandlerError(
            f"{handler.place} takes {', '.join(parameters)} beside the event, and what resolves "
            "dependencies is not installed: FastAPI. Install fastapi-eventkit[fastapi], plug in "
            "another container with EventBus(resolver=...), or close over what the handler needs"
        ) from error
    resolver: Resolver = module.FastAPIResolver()
    return resolver


def _unprovided(handler: Handler, parameter: inspect.Parameter) -> str:
    text = (
        f"{handler.place} takes {parameter.name!r}, "
        "which is neither the event (that comes first) nor "
    )
    if isinstance(parameter.annotation, str):
        return (
            f"{text}seen to be a dependency: its annotation {parameter.annotation!r} cannot be "
            "evaluated. Import what it names at module level, and not for type checkers alone"
        )
    return (
        f"{text}a dependency, and has no default. A handler has no request, so neither query, path "
        "nor body: put what it needs into the event, or say where it comes from, with FastAPI "
        f"`{parameter.name}: Annotated[..., Depends(...)]`"
    )


def _check_call(handler: Handler, provided: Sequence[inspect.Parameter]) -> None:
    """Refuse what the dependencies cannot be given to by name."""
    signature = _signature(handler.function, follow_wrapped=False)
    names = [parameter.name for parameter in provided]
    try:
        if signature is not None:
            signature.bind(object(), **dict.fromkeys(names))
    except TypeError as error:
        raise InvalidHandlerError(
            f"{handler.place} cannot be given its dependencies {', '.join(names)} as keyword "
            f"arguments: {error}. A decorator has to pass on what it is called with: "
            "`def wrapper(*args, **kwargs)`; a dependency cannot be positional-only"
        ) from None


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


def is_duration(seconds: object) -> bool:
    """Whether it is a number of seconds that something can take: above 0, and not NaN."""
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0
