"""Owns the ways to declare handlers: the decorator `on`, and routers.

The functions at the end of this module use private attributes of `EventRouter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from eventkit._core.durable import Durable
from eventkit._core.names import Names, Reruns
from eventkit._core.subscriptions import Declaration, check_event_type, declare
from eventkit.exceptions import (
    InvalidEventTypeError,
    InvalidHandlerError,
    RouterClosedError,
)

E = TypeVar("E")

E2 = TypeVar("E2")

E3 = TypeVar("E3")

E4 = TypeVar("E4")

E_contra = TypeVar("E_contra", contravariant=True)

E_co = TypeVar("E_co", covariant=True)

P = ParamSpec("P")

R = TypeVar("R")

R_co = TypeVar("R_co", covariant=True)


class _Taking(Protocol[E_contra, P, R_co]):  # pyright: ignore[reportInvalidTypeVarUse]
    """A handler as type checkers see it: it takes an event, and it keeps its own signature.

    A callable has to match both overloads. The first one keeps the whole signature: the names of
    the parameters, and the parameters beside the event. The second one checks the event parameter.
    """

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @overload
    def __call__(self, event: E_contra, /, *args: Any, **kwargs: Any) -> object: ...


class _Decorator(Protocol[E_co]):
    """The decorator that `on` returns."""

    @overload
    def __call__(self, handler: _Taking[E_co, P, R], /) -> Callable[P, R]: ...
    @overload  # for mypy, which finds no `P` for a callable whose event parameter has no name
    def __call__(
        self, handler: Callable[Concatenate[E_co, P], R], /
    ) -> Callable[Concatenate[E_co, P], R]: ...


class Subscribing:
    """Base class of `EventBus` and `EventRouter`: it has the decorator `on`."""

    __slots__ = ()

    def _add(self, declarations: Sequence[Declaration]) -> object:
        """Add all declarations, or raise and add none."""

    @overload
    def on(
        self,
        event_type: type[E],
        /,
        *,
        name: str | None = None,
        timeout: float | None | EllipsisType = ...,
        thread: bool | None = None,
        durable: bool | Durable = False,
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
        durable: bool | Durable = False,
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
        durable: bool | Durable = False,
    ) -> _Decorator[E | E2 | E3 | E4]: ...
    def on(
        self,
        *event_types: type,
        name: str | None = None,
        timeout: float | None | EllipsisType = ...,
        thread: bool | None = None,
        durable: bool | Durable = False,
    ) -> Callable[[Callable[..., R]], Callable[..., R]]:
        """Make the decorated function a handler of these event types.

            @bus.on(UserCreated, UserRenamed, timeout=5)
            async def index(event: UserCreated | UserRenamed) -> None: ...

        The decorator returns the function itself, so a unit test can call it. Type checkers keep
        its signature. For different options for each event type, use several decorators.

        The handlers of an event run at the same time. Each has its own context variables. State
        that is kept for each task may be shared by handlers: two handlers that wait at the same
        time have different tasks, but other handlers may share a task.

        Args:
            event_types: The classes whose instances the handler takes; subclasses are included. A
                handler runs once for each event, also if several of its types match.
            name: A stable name of the handler. By default it is `module:qualname`.
            timeout: Time limit of one delivery, in seconds; None for no limit. By default the
                bus's `handler_timeout` applies in drains.
            thread: True starts the call in a worker thread, False on the event loop. By default a
                plain `def` starts in a thread, and everything async on the event loop.
            durable: Whether a table stores the deliveries until they are done, so that a crash
                loses none. `Durable(...)` also says how often a delivery is tried. Needs an
                `eventkit.outbox.Outbox`. The handler may run twice for one event: use
                `complete_with(session)` for your own rows, and `current_delivery().id` as the
                idempotency key for other systems. Every process that publishes the event must
                subscribe the handler, too: it includes the router.

        Returns:
            A decorator that returns the function unchanged.

        Raises:
            InvalidEventTypeError: No event type was given, or one of them is not a class.
            InvalidHandlerError: The function takes no event, or has a parameter that nothing
                provides.
            DuplicateSubscriptionError: The function is subscribed to one of the types already.
            DuplicateNameError: Another handler has this name.
        """
        if not event_types:
            raise InvalidEventTypeError("on() needs at least one event type: on(UserCreated)")
        for event_type in event_types:
            check_event_type(event_type)

        def decorate(handler: Callable[..., R]) -> Callable[..., R]:
            self._add(
                [
                    declare(
                        event_type,
                        handler,
                        name=name,
                        timeout=timeout,
                        thread=thread,
                        durable=durable,
                    )
                    for event_type in event_types
                ]
            )
            return handler

        return decorate


class EventRouter(Subscribing):
    """Collects handlers in a module that does not know the bus, as `APIRouter` collects routes.

        router = EventRouter()

        @router.on(UserCreated)
        async def greet(event: UserCreated) -> None: ...

        bus = EventBus()
        bus.include(router)

    Several buses may include the same router, and a router may include other routers. After a
    router has been included, no handler can be declared on it: an error says so, because nobody
    would call that handler.
    """

    __slots__ = ("_declarations", "_included", "_names", "_reruns", "_routers")

    def __init__(self) -> None:
        self._declarations: dict[tuple[type, object], Declaration] = {}
        self._names = Names()
        self._reruns = Reruns()
        self._routers: list[EventRouter] = []
        self._included = False

    def include(self, router: EventRouter) -> None:
        """Add all handlers of another router to this one, in their order.

        Args:
            router: The other router. Afterwards no handler can be declared on it.

        Raises:
            InvalidHandlerError: The other router is this router, or it includes this router.
            RouterClosedError: This router has been included already.
            DuplicateSubscriptionError: One of the handlers is declared here already.
            DuplicateNameError: Another handler here has the name of one of the handlers.
        """
        if router is self:
            raise InvalidHandlerError("a router cannot be included into itself")
        if _is_inside(self, router):
            raise InvalidHandlerError(
                "two routers cannot include each other: the router that is included here already "
                "includes this router. Remove one of the two include() calls"
            )
        include_into(self, router)
        self._routers.append(router)

    def _add(self, declarations: Sequence[Declaration]) -> None:
        for declaration in declarations:
            declaration.refuse_twin(self._declared(declaration))
        if self._included:
            raise RouterClosedError(
                f"{', '.join(d.declared.name for d in declarations)}: declared on a router that "
                "has been included already, so nobody would call the handler. Declare all handlers "
                "of a router, and include other routers in it, before the router itself is included"
            )
        added: dict[tuple[type, object], Declaration] = {}
        self._names.refuse_clashes(declarations)
        for declaration in declarations:
            key = (declaration.event_type, declaration.declared.identity)
            declaration.refuse_twin(added.get(key), named_twice=True)
            added[key] = declaration
        for declaration in declarations:
            self._drop_earlier(declaration)
        self._declarations.update(added)
        self._names.add(declarations)

    def _declared(self, twin: Declaration) -> Declaration | None:
        """The declaration here of the same handler for the same event type, if there is one."""
        return self._declarations.get((twin.event_type, twin.declared.identity))

    def _drop_earlier(self, declaration: Declaration) -> None:
        """Forget the earlier version of the handler, if its file was executed again."""
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

    if not TYPE_CHECKING:  # pragma: no branch - hidden from checkers, which know the attributes

        def __getattr__(self, name: str) -> object:
            """Explain the mistake if FastAPI's `include_router` was given this router."""
            raise AttributeError(
                f"an EventRouter has no attribute {name!r}. It has event handlers, not routes: "
                "include it in the bus with bus.include(router), not in the application",
                name=name,
                obj=self,
            )

    def __repr__(self) -> str:
        return f"<EventRouter with {len(self._declarations)} declarations>"


def _is_inside(router: EventRouter, outer: object) -> bool:
    """Whether the router has been included into `outer`, directly or through other routers."""
    return isinstance(outer, EventRouter) and any(
        inner is router or _is_inside(router, inner)
        for inner in outer._routers  # noqa: SLF001 - see the module's docstring
    )


def include_into(target: Subscribing, router: EventRouter) -> None:
    """Add all declarations of the router to the target, and close the router."""
    if not isinstance(router, EventRouter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidHandlerError(f"include() takes an EventRouter, not {router!r}")
    declarations = list(router._declarations.values())  # noqa: SLF001 - as in `_is_inside`
    target._add(declarations)  # noqa: SLF001
    router._included = True  # noqa: SLF001
