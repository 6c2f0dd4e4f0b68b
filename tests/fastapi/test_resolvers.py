"""Handlers with dependencies, whoever resolves them: a small container stands for all of them."""

import asyncio
import functools
import gc
import inspect
import sys
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ForwardRef

import anyio
import pytest
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from eventkit import (
    DispatchError,
    EventBus,
    EventRouter,
    HandlerCancelledError,
    HandlerTimeoutError,
    InvalidHandlerError,
    Resolver,
    _core,
    current_delivery,
)
from eventkit.starlette import EventContextMiddleware, Origin
from tests.asgi import Exchange, respond
from tests.dispatching import (
    Boom,
    Cancel,
    Ping,
    Pong,
    by_dispatch,
    cancel_by_scope,
    cancel_natively,
    kinds_in,
)
from tests.witness import assert_settled, freed_by_anyio, ignore

pytestmark = pytest.mark.anyio


class Tool:
    """What handlers of these tests depend on: something that has to be put back."""

    def __init__(self, trace: list[str]) -> None:
        self.trace = trace

    def use(self) -> None:
        self.trace.append("used")


class Shed:
    """A container that has nothing but tools, for parameters of that type."""

    def __init__(self) -> None:
        self.trace: list[str] = []
        self.shown: list[inspect.Parameter] = []
        self.compiled: list[list[str]] = []
        self.origins: list[object] = []
        self.taking: Callable[[], Awaitable[object]] = checkpoint
        self.returning: Callable[[], Awaitable[object]] = checkpoint
        self.swallows = False

    def provides(self, parameter: inspect.Parameter) -> bool:
        self.shown.append(parameter)
        if parameter.name == "unknown":
            raise LookupError("who knows")
        return parameter.annotation is Tool

    def compile(
        self, parameters: Sequence[inspect.Parameter]
    ) -> Callable[[object], AbstractAsyncContextManager[Mapping[str, object]]]:
        names = [parameter.name for parameter in parameters]
        if "cursed" in names:
            raise LookupError("no tool is cursed")
        self.compiled.append(names)

        @asynccontextmanager
        async def solver(origin: object) -> AsyncGenerator[Mapping[str, object]]:
            self.origins.append(origin)
            self.trace.append("taking")
            await self.taking()
            try:
                yield {name: Tool(self.trace) for name in names}
            except BaseException as error:
                self.trace.append(f"returned after {type(error).__name__}")
                if not self.swallows:
                    raise
            else:
                await self.returning()
                self.trace.append("returned")

        return solver


@pytest.fixture
def shed() -> Shed:
    return Shed()


@pytest.fixture
def bus(shed: Shed) -> EventBus:
    bus = EventBus(resolver=shed)
    bus.report_failure = ignore
    return bus


async def on_loop(event: Ping, tool: Tool) -> None:
    await checkpoint()
    tool.use()


def in_thread(event: Ping, *, tool: Tool) -> None:
    tool.use()


def returning_an_awaitable(event: Ping, tool: Tool) -> Awaitable[None]:
    return on_loop(event, tool)


class Handlers:
    async def method(self, event: Ping, tool: Tool) -> None:
        tool.use()

    async def __call__(self, event: Ping, tool: Tool) -> None:
        tool.use()


async def gathering(*events: Ping, tool: Tool) -> None:
    tool.use()


@functools.wraps(on_loop)
async def decorated(*args: Any, **kwargs: Any) -> None:  # passes everything on
    await on_loop(*args, **kwargs)


HANDLERS: list[Callable[..., object]] = [
    on_loop,
    in_thread,
    returning_an_awaitable,
    Handlers().method,
    Handlers(),
    gathering,
    decorated,
    functools.partial(on_loop),
    functools.lru_cache(on_loop),  # has no signature but that of the function inside
]


@pytest.mark.parametrize("handler", HANDLERS, ids=lambda handler: getattr(handler, "__name__", ""))
async def test_a_dependency_is_made_before_the_call_and_put_back_after_it(
    bus: EventBus, shed: Shed, handler: Callable[..., object]
) -> None:
    bus.subscribe(Ping, handler)

    await bus.dispatch(Ping())

    assert shed.trace == ["taking", "used", "returned"]
    assert shed.compiled == [["tool"]]


async def test_each_delivery_has_tools_of_its_own(bus: EventBus, shed: Shed) -> None:
    tools: list[Tool] = []

    @bus.on(Ping)
    async def one(event: Ping, tool: Tool, second: Tool) -> None:
        tools.extend([tool, second])

    @bus.on(Ping)
    async def other(event: Ping, tool: Tool) -> None:
        tools.append(tool)

    await bus.dispatch(Ping())
    await bus.dispatch(Ping())

    assert len(set(tools)) == len(tools) == 6
    assert shed.compiled == [["tool", "second"], ["tool"]]


async def test_a_dependency_runs_in_the_unit_of_work_of_its_delivery(
    bus: EventBus, shed: Shed
) -> None:
    seen: list[object] = []

    async def publish() -> None:
        seen.append(current_delivery().event)
        bus.publish(Pong())

    shed.taking = shed.returning = publish
    bus.subscribe(Ping, on_loop)

    @bus.on(Pong)
    async def pong(event: Pong) -> None:
        cause = current_delivery().cause
        seen.append(cause.event if cause else None)

    await bus.dispatch(Ping(1))

    assert seen == [Ping(1)] * 4


# Failures


async def fail(event: Ping, tool: Tool) -> None:
    raise Boom


def fail_in_thread(event: Ping, tool: Tool) -> None:
    raise Boom


@pytest.mark.parametrize("handler", [fail, fail_in_thread])
@pytest.mark.parametrize("swallows", [False, True])
async def test_a_dependency_sees_the_failure_and_cannot_make_it_undone(
    bus: EventBus, shed: Shed, handler: Callable[..., object], swallows: bool
) -> None:
    shed.swallows = swallows
    bus.subscribe(Ping, handler)

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Ping())

    assert kinds_in(caught.value) == [Boom]
    assert shed.trace == ["taking", "returned after Boom"]
    assert bus.stats.failed == 1


async def explode() -> None:
    raise Boom


@pytest.mark.parametrize("moment", ["taking", "returning"])
async def test_what_a_dependency_raises_fails_its_delivery_and_no_other(
    bus: EventBus, shed: Shed, moment: str
) -> None:
    setattr(shed, moment, explode)
    bus.subscribe(Ping, on_loop)
    bus.subscribe(Ping, in_thread)
    others: list[Ping] = []
    bus.subscribe(Ping, others.append, thread=False)

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Ping())

    assert kinds_in(caught.value) == [Boom, Boom]
    assert shed.trace.count("used") == (2 if moment == "returning" else 0)
    assert (bus.stats.failed, bus.stats.handled) == (2, 1)
    assert others == [Ping()]


async def test_a_failing_exit_takes_back_what_the_handler_published(
    bus: EventBus, shed: Shed
) -> None:
    shed.returning = explode

    @bus.on(Ping)
    async def publish(event: Ping, tool: Tool) -> None:
        bus.publish(Pong())

    bus.subscribe(Pong, ignore_event, thread=False)

    async with bus.context() as unit:
        unit.publish(Ping())

    assert (bus.stats.failed, bus.stats.discarded) == (1, 1)


def ignore_event(event: object) -> None: ...


async def test_a_handler_that_makes_up_a_cancellation_has_failed(
    bus: EventBus, shed: Shed, anyio_backend_name: str
) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("trio's cancellation cannot be made up")

    @bus.on(Ping)
    async def give_up(event: Ping, tool: Tool) -> None:
        raise asyncio.CancelledError

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Ping())

    assert kinds_in(caught.value) == [HandlerCancelledError]
    assert shed.trace == ["taking", "returned after CancelledError"]


@freed_by_anyio
@pytest.mark.parametrize("handler", [fail, fail_in_thread])
async def test_a_failed_delivery_leaves_nothing_behind(
    bus: EventBus, shed: Shed, handler: Callable[..., object]
) -> None:
    bus.subscribe(Ping, handler)
    gc.collect()
    gc.disable()
    try:
        event = Ping()
        gone = weakref.ref(event)
        async with bus.context() as unit:
            unit.publish(event)
        del event, unit
        # A worker thread hands over its result a moment before it lets go of it.
        await anyio.to_thread.run_sync(int)

        assert gone() is None
    finally:
        gc.enable()


# Time and cancellation


@pytest.mark.parametrize("moment", ["taking", "returning"])
async def test_the_deadline_of_a_handler_is_that_of_its_dependencies(
    bus: EventBus, shed: Shed, moment: str
) -> None:
    setattr(shed, moment, anyio.sleep_forever)
    bus.subscribe(Ping, on_loop, timeout=0.2)

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Ping())

    assert kinds_in(caught.value) == [HandlerTimeoutError]


async def test_a_handler_past_its_deadline_has_its_dependencies_cleaned_up(
    bus: EventBus, shed: Shed
) -> None:
    @bus.on(Ping, timeout=0.2)
    async def wait(event: Ping, tool: Tool) -> None:
        await anyio.sleep_forever()

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Ping())

    assert kinds_in(caught.value) == [HandlerTimeoutError]
    assert shed.trace[-1].startswith("returned after Cancel")


async def wait_for_ever(event: Ping, tool: Tool) -> None:
    await anyio.sleep_forever()


@pytest.mark.parametrize("cancel", [cancel_by_scope, cancel_natively])
@pytest.mark.parametrize("moment", ["taking", "returning", "handling"])
async def test_a_cancelled_delivery_is_undelivered_wherever_it_was(
    bus: EventBus, shed: Shed, moment: str, cancel: Cancel, anyio_backend_name: str
) -> None:
    if cancel is cancel_natively and anyio_backend_name != "asyncio":
        pytest.skip("only on asyncio tasks can be cancelled natively")
    if moment == "handling":
        subscription = bus.subscribe(Ping, wait_for_ever)
    else:
        setattr(shed, moment, anyio.sleep_forever)
        subscription = bus.subscribe(Ping, on_loop)

    await cancel(by_dispatch, bus, Ping())

    assert bus.stats.undelivered == 1
    assert_settled(bus)
    subscription.cancel()
    shed.taking = shed.returning = checkpoint
    bus.subscribe(Ping, in_thread)
    await bus.dispatch(Ping())
    assert shed.trace[-3:] == ["taking", "used", "returned"]


async def test_a_thousand_deliveries_at_once_each_return_what_they_took(
    bus: EventBus, shed: Shed
) -> None:
    for number in range(1000):
        bus.subscribe(Ping, functools.partial(on_loop), name=str(number))

    await bus.dispatch(Ping())

    counts = {step: shed.trace.count(step) for step in ("taking", "used", "returned")}
    assert counts == {"taking": 1000, "used": 1000, "returned": 1000}
    assert_settled(bus)


# What is a dependency


async def test_a_parameter_with_a_default_that_nobody_provides_keeps_it(
    bus: EventBus, shed: Shed
) -> None:
    calls: list[tuple[object, ...]] = []

    async def handler(
        event: Ping, attempts: int = 3, *more: int, tool: Tool, loud: bool = True, **options: int
    ) -> None:
        calls.append((attempts, more, type(tool), loud, options))

    bus.subscribe(Ping, handler)
    await bus.dispatch(Ping())

    assert calls == [(3, (), Tool, True, {})]
    assert [parameter.name for parameter in shed.shown] == ["attempts", "tool", "loud"]


async def test_what_a_partial_has_bound_is_no_dependency(bus: EventBus, shed: Shed) -> None:
    bus.subscribe(Ping, functools.partial(on_loop, tool=Tool(shed.trace)))

    await bus.dispatch(Ping())

    assert shed.trace == ["used"]
    assert shed.shown == []


DICT: dict[object, object] = {}
UPDATE: Callable[..., object] = DICT.update


def test_built_ins_without_a_signature_have_no_dependencies(bus: EventBus, shed: Shed) -> None:
    bus.subscribe(Ping, UPDATE)

    assert shed.shown == []


def handler_from(source: str, **names: object) -> Callable[..., object]:
    """Make a handler in a module of its own, whose annotations are postponed."""
    future = "from __future__ import annotations\n"
    namespace: dict[str, Any] = {"__name__": "somewhere", **names}  # as exec fills it
    exec(compile(future + source, "somewhere.py", "exec", dont_inherit=True), namespace)
    function: Callable[..., object] = namespace["handler"]
    return function


@pytest.mark.parametrize(
    ("annotation", "seen"),
    [
        ("Tool", Tool),
        ("'Tool'", Tool),
        ("OnlyForTypeCheckers", ForwardRef("OnlyForTypeCheckers")),
        ("dict[Tool, OnlyForTypeCheckers]", dict[Tool, ForwardRef("OnlyForTypeCheckers")]),  # type: ignore[misc]
        ("module.OnlyForTypeCheckers", "module.OnlyForTypeCheckers"),
        ("1 / 0", "1 / 0"),
        ("fails()", "fails()"),
    ],
)
def test_a_resolver_is_shown_annotations_as_far_as_they_can_be_evaluated(
    bus: EventBus, shed: Shed, annotation: str, seen: object
) -> None:
    def fails() -> None:
        raise NameError("of something else", name="other")

    source = f"def handler(event: Unknown, thing: {annotation} = None): ..."

    bus.subscribe(Ping, handler_from(source, Tool=Tool, fails=fails))

    (parameter,) = shed.shown
    assert parameter.annotation == seen


# Refusals


def refusal(bus: EventBus, handler: Callable[..., object]) -> str:
    with pytest.raises(InvalidHandlerError) as caught:
        bus.subscribe(Ping, handler)
    assert len(bus.describe()) == 0
    return str(caught.value)


def place(function: Callable[..., object]) -> str:
    return f"{__name__}:{function.__qualname__} ({__file__}:{function.__code__.co_firstlineno})"


def test_a_parameter_that_nobody_provides_is_refused(bus: EventBus) -> None:
    def handler(event: Ping, tool: Tool, page: int) -> None: ...

    assert refusal(bus, handler) == (
        f"{place(handler)} takes 'page', which is neither the event (the first parameter) nor "
        "a dependency, and has no default. A handler has no request, so it has no query, no path "
        "and no body. Put what the handler needs into the event, or declare a dependency, with "
        "FastAPI `page: Annotated[..., Depends(...)]`"
    )


def test_a_parameter_that_a_resolver_fails_to_judge_is_refused(bus: EventBus) -> None:
    def handler(event: Ping, unknown: int) -> None: ...

    assert refusal(bus, handler) == f"{place(handler)}: who knows"


def test_an_annotation_that_cannot_be_evaluated_is_named(bus: EventBus) -> None:
    handler = handler_from("def handler(event: Ping, tool: sheds.Tool): ...")

    assert refusal(bus, handler) == (
        "somewhere:handler (somewhere.py:2) takes 'tool', which is neither the event (the first "
        "parameter) nor known to be a dependency: its annotation 'sheds.Tool' cannot be evaluated. "
        "Define or import this name before the handler is subscribed or its router included, and "
        "not only for type checkers"
    )


def test_what_the_resolver_refuses_is_refused_with_the_name_of_the_handler(bus: EventBus) -> None:
    def handler(event: Ping, cursed: Tool) -> None: ...

    assert refusal(bus, handler) == f"{place(handler)}: no tool is cursed"


def test_a_decorator_that_does_not_pass_dependencies_on_is_refused(bus: EventBus) -> None:
    @functools.wraps(on_loop)
    async def narrow(event: Ping) -> None: ...

    assert refusal(bus, narrow) == (
        f"{place(on_loop)} cannot be given its dependencies tool as keyword arguments: got an "
        "unexpected keyword argument 'tool'. A decorator has to pass on all arguments: "
        "`def wrapper(*args, **kwargs)`. A dependency cannot be positional-only"
    )


def test_a_positional_only_dependency_is_refused(bus: EventBus) -> None:
    def handler(event: Ping, tool: Tool, /) -> None: ...

    assert "A dependency cannot be positional-only" in refusal(bus, handler)


@pytest.mark.parametrize("method", [Handlers.method, Handlers.__call__])
def test_a_method_without_its_instance_is_told_so(
    bus: EventBus, method: Callable[..., object]
) -> None:
    assert refusal(bus, method).endswith("subscribe the method of an instance")


def test_a_router_knows_no_resolver_so_the_bus_refuses_and_takes_none(shed: Shed) -> None:
    router = EventRouter()
    router.on(Ping)(on_loop)

    @router.on(Ping)
    def handler(event: Ping, page: int) -> None: ...

    bus = EventBus(resolver=shed)
    with pytest.raises(InvalidHandlerError, match="takes 'page'"):
        bus.include(router)

    assert bus.describe() == []


@pytest.mark.parametrize("resolver", [object(), Shed, "fastapi"])
def test_something_else_than_a_resolver_is_refused(resolver: Any) -> None:  # the misuse
    with pytest.raises(TypeError) as caught:
        EventBus(resolver=resolver)

    assert str(caught.value) == (
        f"resolver takes an object with the methods of eventkit.Resolver, not {resolver!r}"
    )


# Without FastAPI


@pytest.fixture
def _no_fastapi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "eventkit._core.depends", raising=False)
    monkeypatch.delattr(_core, "depends", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)


@pytest.mark.usefixtures("_no_fastapi")
def test_dependencies_without_anyone_to_resolve_them_are_refused() -> None:
    assert refusal(EventBus(), on_loop) == (
        f"{place(on_loop)} takes tool beside the event, but FastAPI, which provides dependencies "
        "by default, is not installed. Install fastapi-eventkit[fastapi], use another container "
        "with EventBus(resolver=...), or remove the parameters"
    )


@pytest.mark.usefixtures("_no_fastapi")
def test_a_container_of_ones_own_needs_no_fastapi(shed: Shed) -> None:
    resolver: Resolver = shed
    bus = EventBus(resolver=resolver)

    bus.subscribe(Ping, on_loop)

    assert shed.compiled == [["tool"]]


# Which application it is told of, where a request without a lifespan publishes.


def spoiling(bus: EventBus) -> ASGIApp:
    """An app that publishes, and changes what the request came in with."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish(Ping())
        scope["app"] = Starlette()
        scope.setdefault("state", {})["name"] = "something of this request"
        await respond(send)

    return app


async def origin_of(app: ASGIApp, shed: Shed, scope: Mapping[str, Any] | None = None) -> Origin:
    """What the resolver is told of a request with this in its scope."""
    exchange = Exchange()
    exchange.scope.update(scope or {})
    await exchange.run(app)
    origin = shed.origins.pop()
    assert isinstance(origin, Origin)
    return origin


async def test_a_request_tells_of_the_application_and_the_state_that_it_came_in_with(
    bus: EventBus, shed: Shed
) -> None:
    bus.subscribe(Ping, on_loop)
    app = EventContextMiddleware(spoiling(bus), bus)
    one, other = Starlette(), Starlette()

    for known in (None, one, one, other, one, None):
        for state in ({}, {"name": "a state"}, {}):
            scope: Scope = {"app": known, "state": dict(state)}
            origin = await origin_of(app, shed, scope)
            assert origin.app is known
            assert origin.state == state


async def test_an_application_that_was_wrapped_by_hand_is_found_also_if_it_comes_late(
    bus: EventBus, shed: Shed
) -> None:
    class Late:
        app: object = None

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await spoiling(bus)(scope, receive, send)

    bus.subscribe(Ping, on_loop)
    late = Late()
    app = EventContextMiddleware(late, bus)

    assert (await origin_of(app, shed)).app is None
    late.app = Starlette()
    assert (await origin_of(app, shed)).app is late.app
    late.app = Starlette()
    assert (await origin_of(app, shed)).app is late.app


async def test_what_requests_share_of_their_origin_cannot_be_changed(
    bus: EventBus, shed: Shed
) -> None:
    bus.subscribe(Ping, on_loop)
    app = EventContextMiddleware(spoiling(bus), bus)

    origin = await origin_of(app, shed)
    assert origin is await origin_of(app, shed)
    with pytest.raises(TypeError):
        origin.state["name"] = "for all"  # type: ignore[index] # pyright: ignore[reportIndexIssue]
