"""Owns who subscribed to what: subscriptions, routers, resolution and its cache.

Knows nothing of how handlers are run.
"""
# ruff: noqa: SLF001 - the classes and functions of this module own its state together

from __future__ import annotations

import atexit
import gc
import inspect
import logging
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import count
from types import EllipsisType, FrameType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, overload
from weakref import WeakSet, WeakValueDictionary

from eventkit._events import type_name
from eventkit._handlers import Handler, Resolver, inspect_handler, timed, with_dependencies
from eventkit._log import log
from eventkit._stats import new_lock
from eventkit.exceptions import (
    DuplicateNameError,
    DuplicateSubscriptionError,
    InvalidEventTypeError,
    InvalidHandlerError,
    RouterClosedError,
)

D = TypeVar("D", bound="Declaration")
E = TypeVar("E")
E2 = TypeVar("E2")
E3 = TypeVar("E3")
E4 = TypeVar("E4")
E_contra = TypeVar("E_contra", contravariant=True)
E_co = TypeVar("E_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_order = count()
# Modules whose classes nobody has made to say what happened.
_NOT_OURS = {
    "builtins",
    "collections",
    "datetime",
    "decimal",
    "fractions",
    "functools",
    "itertools",
    "types",
    "uuid",
}
_MADE_BY_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE of CPython: made while Python runs
_IMPORTLIB = "<frozen importlib._bootstrap>"


class Declaration:
    """A handler for an event type, as declared and checked, not yet tied to a bus."""

    __slots__ = ("_declared", "_event_type", "_file", "_line")

    def __init__(self, event_type: type, declared: Handler, file: str, line: int | None) -> None:
        self._event_type = event_type
        self._declared = declared
        self._file = file  # shared, and so put together with the line only when asked
        self._line = line

    @property
    def event_type(self) -> type:
        """Instances of it and of its subclasses are delivered."""
        return self._event_type

    @property
    def subscribed_at(self) -> str:
        """Where it was subscribed, or declared on a router, as `file:line`."""
        return _place(self._file, self._line)

    def _refuse_twin(self, twin: Declaration | None, *, named_twice: bool = False) -> None:
        """Raise if the same handler is there for the same event type already.

        Args:
            twin: The declaration of the same handler, if there is one.
            named_twice: Whether one decorator has made both declarations.
        """
        if twin is not None:
            included_twice = twin._declared is self._declared
            raise DuplicateSubscriptionError(
                self._declared.name,
                type_name(self._event_type),
                twin.subscribed_at,
                caller() if included_twice else self.subscribed_at,
                included_twice=included_twice,
                named_twice=named_twice,
            )


class Subscription(Declaration):
    """Ties one handler to one event type. Made by `EventBus.subscribe`; `cancel()` ends it.

    Also a context manager that cancels at the end of the block. May be cancelled from any thread.

    Attributes:
        active: False once cancelled.
        target: What a delivery runs: the declared handler, but for a fake of the testing kit.
    """

    __slots__ = ("_order", "_registry", "_successor", "active", "target")

    def __init__(self, declaration: Declaration, target: Handler, registry: Registry) -> None:
        super().__init__(
            declaration._event_type, declaration._declared, declaration._file, declaration._line
        )
        self.target: Handler = target
        self.active: bool = True
        self._order = next(_order)
        self._registry = registry
        self._successor: Subscription | None = None  # who has replaced it

    @property
    def _latest(self) -> Subscription:
        """Who stands in its place now: itself, or the last one that has replaced it."""
        latest = self
        while latest._successor is not None:
            latest = latest._successor
        return latest

    @property
    def handler(self) -> Callable[..., object]:
        """The callable as it was given."""
        return self._declared.function

    @property
    def name(self) -> str:
        """The handler's stable name: its `module:qualname` as it was then, or what `name=` said."""
        return self.target.name

    @property
    def location(self) -> str:
        """Where the handler is defined, as `file:line`."""
        return self.target.location

    @property
    def thread(self) -> bool:
        """Whether the call starts in a worker thread."""
        return self.target.in_thread

    @property
    def timeout(self) -> float | None | EllipsisType:
        """Seconds a delivery may take, None for no limit, `...` for the bus's default."""
        return self.target.timeout

    def cancel(self) -> None:
        """End the subscription. Its deliveries of events that have not started are discarded."""
        self._registry.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __repr__(self) -> str:
        state = "" if self.active else " (cancelled)"
        return f"<Subscription {type_name(self.event_type)} -> {self.name} {self.location}{state}>"


class Plan(tuple[Subscription, ...]):  # noqa: SLOT001 - a tuple can have no slots
    """The subscriptions that an event reaches, in start order, and what a drain wants to know.

    Attributes:
        handlers: What each of them runs.
        places: Which of them are active.
        alike: Whether all handlers are bare coroutine functions under the usual limit.
        valid: Whether all this is still so; where it is not, `renewed` is.
    """

    handlers: tuple[Handler, ...]
    places: Sequence[int]
    alike: bool
    valid: bool
    _groups: Sequence[Sequence[Subscription]] | None  # None where each is alone in its group

    @classmethod
    def of(cls, groups: Sequence[Sequence[Subscription]]) -> Self:
        """As things stand, given the subscriptions of each handler that the event reaches.

        An event may reach a handler through several of its types. The handler runs once, for the
        first of these subscriptions that is active.
        """
        plan = cls(_first_active(group) for group in groups)
        plan._groups = groups if any(len(group) > 1 for group in groups) else None
        plan.handlers = tuple(each.target for each in plan)
        plan.places = range(len(plan))
        if not all(each.active for each in plan):
            plan.places = [place for place in plan.places if plan[place].active]
        plan.alike = all(handler.direct for handler in plan.handlers)
        plan.valid = True
        return plan

    def renewed(self) -> Self:
        """The same handlers at the same places, as things stand now."""
        return self.of(self._groups or [(each,) for each in self])


def _first_active(group: Sequence[Subscription]) -> Subscription:
    latest = [each._latest for each in group]
    return next((each for each in latest if each.active), group[0])


def declare(
    event_type: type,
    handler: Callable[..., object],
    *,
    name: str | None = None,
    timeout: float | None | EllipsisType = ...,
    thread: bool | None = None,
) -> Declaration:
    """Check what a user wants to subscribe.

    Raises:
        InvalidEventTypeError: `event_type` is not a class.
        InvalidHandlerError: The handler cannot be called with an event, or not as asked.
    """
    check_event_type(event_type)
    target = inspect_handler(handler, name=name, timeout=timeout, thread=thread)
    return Declaration(event_type, target, *_calling())


def check_event_type(event_type: object) -> None:
    """Refuse what no event can be an instance of."""
    alias = hasattr(event_type, "__origin__")
    if isinstance(event_type, type) and not alias and event_type is not Any:
        return
    kind = type(event_type)
    if isinstance(event_type, str):
        remedy = "Give the class itself instead of its name"
    elif inspect.isroutine(event_type):
        remedy = (
            "A decorator takes the event type in parentheses: @bus.on(UserCreated); subscribe "
            "takes it first: subscribe(UserCreated, handler)"
        )
    elif alias or event_type is Any or kind.__module__ in {"builtins", "types", "typing"}:
        remedy = (
            "For one of several, name them all: on(A, B); for a generic class, name the class "
            "without its parameters"
        )
    else:
        remedy = f"For its class: {kind.__name__}"
    raise InvalidEventTypeError(f"an event type is a class, not {event_type!r}. {remedy}")


def refuse_non_event(event: object) -> None:
    """Refuse a class where its instance was meant."""
    if isinstance(event, type):
        raise InvalidEventTypeError(
            f"an event is an instance, not a class: publish {event.__name__}(...), not "
            f"{event.__name__}"
        )


def _is_event_type(event_type: type) -> bool:
    """Whether it looks like a class of events, so that an instance without a handler is fine."""
    if issubclass(event_type, BaseException):
        return True
    module, name = event_type.__module__, event_type.__qualname__
    foreign = module in _NOT_OURS and (
        not event_type.__flags__ & _MADE_BY_PYTHON
        # A class that `exec`, `new_class` or `make_dataclass` has made may only claim to be there.
        or getattr(sys.modules.get(module), name, None) is event_type
    )
    return not foreign and not issubclass(event_type, Enum)


def _not_an_event(event: object) -> InvalidEventTypeError:
    """What to say of an instance of what is no event type, and has no handler. Not its value."""
    name = type(event).__name__
    no_event = f"an object of the type {name!r} is no event that anybody handles"
    if isinstance(event, Coroutine):
        return InvalidEventTypeError(f"{no_event}: await it, and publish what it returns")
    if isinstance(event, Iterable) and not isinstance(event, str | bytes | bytearray | Mapping):
        return InvalidEventTypeError(f"{no_event}: publish the events in it, publish(*events)")
    kind = f"a member of the enum {name!r}" if isinstance(event, Enum) else f"of {name!r}"
    return InvalidEventTypeError(
        f"an event is an instance of a class of yours, not {kind}, which nobody handles: make a "
        "class of what happened, and publish an instance, publish(UserCreated(...))"
    )


def caller() -> str:
    """The nearest line outside eventkit, and outside contextlib, which enters what we give."""
    return _place(*_calling())


def _place(file: str, line: int | None) -> str:
    return file if line is None else f"{file}:{line}"


def _calling() -> tuple[str, int | None]:
    """The file and the line that `caller` tells."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (
        frame.f_globals.get("__package__") == __package__
        or frame.f_globals.get("__name__") == "contextlib"
    ):
        frame = frame.f_back
    return (frame.f_code.co_filename, frame.f_lineno) if frame else ("unknown", None)


class _Names:
    """Which handler was given which name; it may have it for several event types."""

    __slots__ = ("_given",)

    def __init__(self) -> None:
        self._given: dict[str, dict[type, Declaration]] = {}

    def refuse_clashes(self, declarations: Iterable[Declaration]) -> None:
        """Raise if two different handlers would have the same name.

        Raises:
            DuplicateNameError: Naming both handlers.
        """
        firsts: dict[str, Declaration] = {}
        for declaration in _with_given_name(declarations):
            handler, name = declaration._declared, declaration._declared.name
            holders = [firsts.setdefault(name, declaration)]
            if name in self._given:
                holders.append(next(iter(self._given[name].values())))
            for holder in holders:
                known = holder._declared
                if known.identity != handler.identity and not handler.comes_again(known):
                    raise DuplicateNameError(name, holder._declared.location, handler.location)

    def add(self, declarations: Iterable[Declaration]) -> None:
        """Note them."""
        for declaration in _with_given_name(declarations):
            types = self._given.setdefault(declaration._declared.name, {})
            types[declaration.event_type] = declaration

    def remove(self, declaration: Declaration) -> None:
        """Forget it."""
        if declaration._declared.named:
            types = self._given[declaration._declared.name]
            del types[declaration.event_type]
            if not types:
                del self._given[declaration._declared.name]


def _with_given_name(declarations: Iterable[Declaration]) -> Iterator[Declaration]:
    return (declaration for declaration in declarations if declaration._declared.named)


class _Reruns:
    """Handlers whose file has run again: by which names was said once."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def earlier(self, declaration: Declaration, known: Iterable[D]) -> D | None:
        """The one among those of the same type that the declaration replaces, if there is one."""
        handler = declaration._declared
        return next((each for each in known if handler.comes_again(each._declared)), None)

    def warn(self, earlier: Declaration, later: Declaration) -> None:
        """Log it, once for each pair of modules."""
        modules = earlier._declared.defined_in, later._declared.defined_in
        if modules not in self._told:
            self._told.add(modules)
            log(
                logging.WARNING,
                "a module has run twice, and its handlers were replaced",
                first_as=modules[0],
                again_as=modules[1],
                file=later._declared.location.rpartition(":")[0],
            )


class _Taking(Protocol[E_contra, P, R_co]):  # pyright: ignore[reportInvalidTypeVarUse]
    """A handler as type checkers see it: it takes an event, and it has a signature of its own.

    A callable has to fit both. The first one keeps all of it, with the names of its parameters and
    with what it takes beyond the event type. The second one checks it.
    """

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @overload
    def __call__(self, event: E_contra, /, *args: Any, **kwargs: Any) -> object: ...


class _Decorator(Protocol[E_co]):
    """What `on` returns."""

    @overload
    def __call__(self, handler: _Taking[E_co, P, R], /) -> Callable[P, R]: ...
    @overload  # mypy finds no `P` for a callable of exactly this event whose parameter has no name
    def __call__(
        self, handler: Callable[Concatenate[E_co, P], R], /
    ) -> Callable[Concatenate[E_co, P], R]: ...


class Subscribing:
    """The decorator `on`, for whatever can take declarations."""

    __slots__ = ()

    def _add(self, declarations: Sequence[Declaration]) -> object:
        """Take all of them, or raise and take none."""

    @overload
    def on(
        self,
        event_type: type[E],
        /,
        *,
        name: str | None = None,
        timeout: float | None | EllipsisType = ...,
        thread: bool | None = None,
    ) -> _Decorator[E]: ...
    @overload
    def on(
        self,
        event_type: type[E],
        second: type[E2],
        /,
        *,
        name: str | None = None,
        timeout: float | None | EllipsisType = ...,
        thread: bool | None = None,
    ) -> _Decorator[E | E2]: ...
    @overload
    def on(
        self,
        event_type: type[E],
        second: type[E2],
        third: type[E3],
        /,
        *more: type[E4],
        name: str | None = None,
        timeout: float | None | EllipsisType = ...,
        thread: bool | None = None,
    ) -> _Decorator[E | E2 | E3 | E4]: ...
    def on(
        self,
        *event_types: type,
        name: str | None = None,
        timeout: float | None | EllipsisType = ...,
        thread: bool | None = None,
    ) -> Callable[[Callable[..., R]], Callable[..., R]]:
        """Declare the decorated function a handler, and return it unchanged.

        Type checkers see its own signature afterwards, so a unit test may call it by the names of
        its parameters. To give the event types options of their own, stack decorators.

        The handlers of an event run at the same time, each in its own context variables. What is
        kept per task may be shared: no two handlers that wait have the same task, but one that
        does not wait shares its task with others.

        Args:
            event_types: The classes whose instances it takes; subclasses are included. A handler
                runs once per event, however many of them match.
            name: A stable name, where `module:qualname` would not be one.
            timeout: Seconds that one delivery may take, None for no limit; left out, the bus's
                `handler_timeout` holds in drains.
            thread: Where the call starts: True in a worker thread, False on the event loop; left
                out, a plain `def` in a thread and everything async on the loop.

        Raises:
            InvalidEventTypeError: Something else than classes was given, or nothing.
            InvalidHandlerError: The function takes no event, or something that nobody provides.
            DuplicateSubscriptionError: It is subscribed to one of the types already.
            DuplicateNameError: Another handler has been given this name.
        """
        if not event_types:
            raise InvalidEventTypeError("on() needs the event types: on(UserCreated)")
        for event_type in event_types:
            check_event_type(event_type)

        def decorate(handler: Callable[..., R]) -> Callable[..., R]:
            self._add(
                [
                    declare(event_type, handler, name=name, timeout=timeout, thread=thread)
                    for event_type in event_types
                ]
            )
            return handler

        return decorate


class EventRouter(Subscribing):
    """Handlers declared in a module of their own, with no bus in sight.

    As FastAPI's `APIRouter` does for routes: decorate with `on`, then `bus.include(router)`, in
    as many buses as there are. Routers nest. A router is complete once it has been included;
    declaring later is an error, because nobody would call the handler.

        router = EventRouter()

        @router.on(UserCreated)
        async def greet(event: UserCreated) -> None: ...

        bus = EventBus()
        bus.include(router)
    """

    __slots__ = ("_declarations", "_included", "_names", "_reruns", "_routers")

    def __init__(self) -> None:
        self._declarations: dict[tuple[type, object], Declaration] = {}
        self._names = _Names()
        self._reruns = _Reruns()
        self._routers: list[EventRouter] = []
        self._included = False

    def include(self, router: EventRouter) -> None:
        """Take over all declarations of another router, in their order.

        Raises:
            InvalidHandlerError: It is this router itself, or one that includes it.
            RouterClosedError: This router has been included somewhere already.
            DuplicateSubscriptionError: One of its handlers is declared here already.
            DuplicateNameError: The name of one of its handlers is taken here.
        """
        if router is self:
            raise InvalidHandlerError("a router cannot be included into itself")
        if _is_inside(self, router):
            raise InvalidHandlerError(
                "a router cannot be included into itself, which this one would be through a "
                "router that it has included: include only the outer one of the two"
            )
        include_into(self, router)
        self._routers.append(router)

    def _add(self, declarations: Sequence[Declaration]) -> None:
        if self._included:
            raise RouterClosedError(
                f"{', '.join(d._declared.name for d in declarations)}: declared on a router that "
                "had been included already, so nobody would call it. Declare all handlers, and "
                "include all routers, before the router itself is included"
            )
        added: dict[tuple[type, object], Declaration] = {}
        self._names.refuse_clashes(declarations)
        for declaration in declarations:
            key = (declaration.event_type, declaration._declared.identity)
            declaration._refuse_twin(self._declarations.get(key))
            declaration._refuse_twin(added.get(key), named_twice=True)
            added[key] = declaration
        for declaration in declarations:
            self._drop_earlier(declaration)
        self._declarations.update(added)
        self._names.add(declarations)

    def _drop_earlier(self, declaration: Declaration) -> None:
        """Forget the handler that this one replaces, because its file has run again."""
        known = {
            key: each
            for key, each in self._declarations.items()
            if each.event_type is declaration.event_type
        }
        earlier = self._reruns.earlier(declaration, known.values())
        if earlier is not None:
            self._declarations = {
                key: each for key, each in self._declarations.items() if each is not earlier
            }
            self._names.remove(earlier)
            self._reruns.warn(earlier, declaration)

    if not TYPE_CHECKING:  # pragma: no branch - checkers know best what it has

        def __getattr__(self, name: str) -> object:
            """Say what `include_router` of FastAPI would not: this is another kind of router."""
            raise AttributeError(
                f"an EventRouter has no attribute {name!r}. It has handlers of events and no "
                "routes: the bus includes it, bus.include(router), not the application",
                name=name,
                obj=self,
            )

    def __repr__(self) -> str:
        return f"<EventRouter with {len(self._declarations)} declarations>"


def _is_inside(router: EventRouter, outer: object) -> bool:
    """Whether it has been included into the other one, directly or through others."""
    return isinstance(outer, EventRouter) and any(
        inner is router or _is_inside(router, inner) for inner in outer._routers
    )


def include_into(target: Subscribing, router: EventRouter) -> None:
    """Give the target all that was declared on the router; then nothing more may be."""
    if not isinstance(router, EventRouter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidHandlerError(f"include() takes an EventRouter, not {router!r}")
    target._add(list(router._declarations.values()))
    router._included = True


class Registry:
    """All subscriptions of one bus.

    Thread-safe: changes take the lock and drop the cache; a look-up in the cache takes none.

    Args:
        resolver: Compiles the dependencies of handlers; None for FastAPI's, once one has some.
        unhandled: Called with each type of events that nobody handles, when the first is published.
        timed: Whether the steps of handlers are timed, to name those that block the event loop.
    """

    __slots__ = (
        "__weakref__",
        "_by_type",
        "_changes",
        "_lasting",
        "_lock",
        "_names",
        "_plans",
        "_reruns",
        "_resolver",
        "_subscribed",
        "_tell_unhandled",
        "_timed",
        "_unhandled",
    )

    def __init__(
        self, resolver: Resolver | None, unhandled: Callable[[type], None], *, timed: bool
    ) -> None:
        self._resolver = resolver
        self._tell_unhandled = unhandled
        self._timed = timed
        self._lock = new_lock()
        self._by_type: dict[type, dict[object, Subscription]] = {}
        self._names = _Names()
        self._changes = 0
        self._reruns = _Reruns()
        self._plans: dict[type, Plan] = {}
        self._unhandled: WeakSet[type] = WeakSet()  # told once: each stream drops the cache twice
        self._subscribed: WeakSet[type] = WeakSet()  # what had a handler, and looks like no event
        self._lasting: list[Subscription] = []  # made by an import since somebody keeps the state
        _registries[id(self)] = self

    def add(self, declarations: Sequence[Declaration]) -> list[Subscription]:
        """Subscribe all of them, or raise and subscribe none.

        Raises:
            DuplicateSubscriptionError: Naming both places.
            InvalidHandlerError: A handler takes something that nobody provides.
            DuplicateNameError: Naming both handlers.
        """
        targets = [with_dependencies(d._declared, self._resolver) for d in declarations]
        with self._lock:
            added: dict[type, dict[object, Subscription]] = {}
            self._names.refuse_clashes(declarations)
            for declaration, target in zip(declarations, targets, strict=True):
                event_type, identity = declaration.event_type, target.identity
                declaration._refuse_twin(self._by_type.get(event_type, {}).get(identity))
                declaration._refuse_twin(added.get(event_type, {}).get(identity), named_twice=True)
                to_run = timed(target) if self._timed else target
                subscription = Subscription(declaration, to_run, self)
                added.setdefault(event_type, {})[identity] = subscription
            replaced = self._replace(s for group in added.values() for s in group.values())
            for event_type, subscriptions in added.items():
                self._by_type.setdefault(event_type, {}).update(subscriptions)
                if not _is_event_type(event_type):
                    self._subscribed.add(event_type)
            self._names.add(declarations)
            self._changed()
            made = in_order(s for group in added.values() for s in group.values())
            if _importing():
                self._lasting += made
        for earlier, later in replaced:
            self._reruns.warn(earlier, later)
        return made

    def _replace(
        self, subscriptions: Iterable[Subscription]
    ) -> list[tuple[Subscription, Subscription]]:
        """Have each stand in the place of the one whose file has run again, if there is one.

        What waits for the earlier one is handled by the later one. Needs the lock.
        """
        replaced: list[tuple[Subscription, Subscription]] = []
        for later in subscriptions:
            group = self._by_type.get(later.event_type, {})
            earlier = self._reruns.earlier(later, group.values())
            if earlier is not None:
                self.remove(earlier)
                earlier._successor = later
                later._order = earlier._order
                replaced.append((earlier, later))
        return replaced

    def remove(self, subscription: Subscription) -> None:
        """End a subscription; the second time nothing happens."""
        with self._lock:
            if subscription.active:
                subscription.active = False
                subscriptions = self._by_type[subscription.event_type]
                del subscriptions[subscription._declared.identity]
                if not subscriptions:
                    del self._by_type[subscription.event_type]
                self._names.remove(subscription)
                self._changed()

    def retarget(self, subscription: Subscription, target: Handler) -> None:
        """Have another handler run in the place of the declared one, also for what is queued."""
        with self._lock:
            subscription.target = target
            self._changed()

    def _changed(self) -> None:
        """Note that subscriptions are others than before. Needs the lock."""
        self._changes += 1
        self._forget_plans()

    def _forget_plans(self) -> None:
        """Look everything up again; deliveries that wait have their plans. Needs the lock.

        The lock keeps other threads out, but not a finalizer that publishes in the midst of this.
        What it looks up goes into the new cache.
        """
        plans, self._plans = self._plans, {}
        for plan in plans.values():
            plan.valid = False

    def let_types_go(self) -> None:
        """Have the cache keep no type alive; it is filled again by what is published.

        Called by the garbage collector, so in any thread and at any moment. Where another thread
        is at work here, the types stay until the next time.
        """
        if self._lock.acquire(blocking=False):
            try:
                self._forget_plans()
            finally:
                self._lock.release()

    def keep(self) -> Callable[[], None]:
        """Remember who is subscribed now; what is returned brings that back.

        Who was subscribed since is cancelled, and who was cancelled since is subscribed again.
        What a module has subscribed while it was imported stays: it will not be imported twice.
        """
        with self._lock:
            then = [each for group in self._by_type.values() for each in group.values()]
            changes = self._changes
            subscribed = {*self._subscribed}
            self._lasting = []

        def restore() -> None:
            with self._lock:
                if self._changes == changes:
                    return
                for subscription in self:
                    subscription.active = False
                self._by_type, self._names = {}, _Names()
                self._subscribed = WeakSet(subscribed)
                stay = {*then, *self._lasting}
                for subscription in in_order(stay):
                    if subscription._latest is not subscription and subscription._latest in stay:
                        continue  # its module was imported again
                    subscription._successor = None
                    group = self._by_type.setdefault(subscription.event_type, {})
                    group[subscription._declared.identity] = subscription
                    subscription.active = True
                    self._names.add([subscription])
                self._changed()

        return restore

    def plan_for(self, event: object) -> Plan:
        """The subscriptions that an event reaches, in start order.

        Raises:
            InvalidEventTypeError: It is a class, or nobody handles it and it looks like no event.
        """
        plan = self._plans.get(type(event))
        return self._look_up(event) if plan is None else plan

    def _look_up(self, event: object) -> Plan:
        """Do as `plan_for`, for a type that is not in the cache."""
        refuse_non_event(event)
        event_type = type(event)
        with self._lock:
            plans = self._plans
            plan = self.resolve(event_type)
            if not plan and not self._is_known(event_type):
                raise _not_an_event(event)
            plans[event_type] = plan
            if self._plans is not plans:  # a finalizer has changed something while we looked
                plan.valid = False
            is_news = not plan and event_type not in self._unhandled
            if is_news:
                self._unhandled.add(event_type)
        if is_news:
            self._tell_unhandled(event_type)
        return plan

    def _is_known(self, event_type: type) -> bool:
        """Whether it looks like a class of events, or has had a handler of its own before.

        A stream of texts that nobody reads any more must not make `publish` raise.
        """
        return _is_event_type(event_type) or any(
            base in self._subscribed for base in event_type.__mro__ if base is not object
        )

    def resolve(self, event_type: type) -> Plan:
        """The subscriptions for an event of exactly this type, in start order.

        Who only asks leaves no trace: what is refused and what is logged is up to `plan_for`.
        """
        groups: dict[object, list[Subscription]] = {}
        with self._lock:
            for base in event_type.__mro__:
                for identity, subscription in [*self._by_type.get(base, {}).items()]:
                    groups.setdefault(identity, []).append(subscription)
            return Plan.of(sorted(map(in_order, groups.values()), key=_order_of_first))

    def __iter__(self) -> Iterator[Subscription]:
        with self._lock:
            subscriptions = in_order(s for group in self._by_type.values() for s in group.values())
        return iter(subscriptions)


# All registries of the process, by their id, as long as their buses live.
_registries: WeakValueDictionary[int, Registry] = WeakValueDictionary()
_partial_collections = count(1)
_PARTIAL_COLLECTIONS = 1000


def _before_collecting(phase: str, info: Mapping[str, int]) -> None:
    """Have no cache keep types that the garbage collector could free.

    A class is part of reference cycles, so nothing but the collector frees it. A cache with weak
    keys would make each look-up twice as dear. Full collections are rare and cost more than to
    look everything up again. Python 3.14 and builds without the GIL start none by themselves, so
    now and then a partial one does it, too.
    """
    if phase == "start" and (
        info["generation"] == 2 or next(_partial_collections) % _PARTIAL_COLLECTIONS == 0
    ):
        alive = [each() for each in _registries.valuerefs()]
        for registry in filter(None, alive):
            registry.let_types_go()


gc.callbacks.append(_before_collecting)
atexit.register(gc.callbacks.remove, _before_collecting)  # afterwards this module is taken apart


def _importing() -> bool:
    """Whether a module that is being imported has called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _IMPORTLIB:
        frame = frame.f_back
    return frame is not None


def in_order(subscriptions: Iterable[Subscription]) -> list[Subscription]:
    """Sorted by when they were subscribed, which is the order in which they start."""
    return sorted(subscriptions, key=_order_of)


def _order_of(subscription: Subscription) -> int:
    return subscription._order


def _order_of_first(group: Sequence[Subscription]) -> int:
    return group[0]._order
