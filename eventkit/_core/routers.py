"""Owns the ways to declare handlers: the decorator `on`, and routers.

The functions of this module share the state of routers with their class.
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
        """Declare the decorated function a handler, and return it unchanged.

        Type checkers see its own signature afterwards, so a unit test may call it by the names of
        its parameters. To give the event types options of their own, stack decorators.

        The handlers of an event run at the same time, each in its own context variables. What is
        kept per task may be shared: no two handlers that wait at the same time have the same task,
        but one that does not wait, or waits later, shares its task with others.

        Args:
            event_types: The classes whose instances it takes; subclasses are included. A handler
                runs once per event, however many of them match.
            name: A stable name, where `module:qualname` would not be one.
            timeout: Seconds that one delivery may take, None for no limit; left out, the bus's
                `handler_timeout` holds in drains.
            thread: Where the call starts: True in a worker thread, False on the event loop; left
                out, a plain `def` in a thread and everything async on the loop.
            durable: Whether its deliveries are kept in a table until they are done, so that no
                crash loses them; `Durable(...)` says how often they are tried. Needs an
                `eventkit.outbox.Outbox`. May run twice: use `complete_with(session)` for your own
                rows, `current_delivery().id` as a key elsewhere. Every process that publishes
                includes the router.

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
        self._names = Names()
        self._reruns = Reruns()
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
        for declaration in declarations:
            declaration.refuse_twin(self._declared(declaration))
        if self._included:
            raise RouterClosedError(
                f"{', '.join(d.declared.name for d in declarations)}: declared on a router that "
                "had been included already, so nobody would call it. Declare all handlers, and "
                "include all routers, before the router itself is included"
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
        """The declaration of the same handler for the same event type, if there is one."""
        return self._declarations.get((twin.event_type, twin.declared.identity))

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
        inner is router or _is_inside(router, inner)
        for inner in outer._routers  # noqa: SLF001 - see above
    )


def include_into(target: Subscribing, router: EventRouter) -> None:
    """Give the target all that was declared on the router; then nothing more may be."""
    if not isinstance(router, EventRouter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidHandlerError(f"include() takes an EventRouter, not {router!r}")
    declarations = list(router._declarations.values())  # noqa: SLF001 - see above
    target._add(declarations)  # noqa: SLF001
    router._included = True  # noqa: SLF001
