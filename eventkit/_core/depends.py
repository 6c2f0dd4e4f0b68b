"""Owns `FastAPIResolver`. It is imported when a handler has dependencies.

FastAPI itself finds, makes and cleans up the dependencies. Its functions for this are private, and
only this module uses them. Knows nothing of databases.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Annotated, Any, NoReturn, cast, get_args, get_origin

import fastapi
from fastapi import params
from fastapi.security import SecurityScopes
from fastapi.security.base import SecurityBase
from starlette.background import BackgroundTasks
from starlette.datastructures import Headers, QueryParams, State
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Message

from eventkit._core.ambient import current_delivery, delivering
from eventkit._core.asgi import Origin
from eventkit._core.dependencies import Aliased
from eventkit._core.handlers import Solver, location_of, name_of
from eventkit._core.log import log
from eventkit.exceptions import EventKitError, InvalidHandlerError, NoRequestError

# `_MARKERS`: objects in a default or in `Annotated`. `_TYPES`: annotations without a marker.
_MARKERS = (params.Depends, params.Param, params.Body)
_TYPES = (HTTPConnection, Response, BackgroundTasks, SecurityScopes)

# Attributes of FastAPI's `Dependant` for parameters that only a request or response can provide.
_FIELDS = {
    "path_params": "path parameter",
    "query_params": "query parameter",
    "header_params": "header",
    "cookie_params": "cookie",
    "body_params": "body",
}
_OBJECTS = {
    "response_param_name": "Response",
    "websocket_param_name": "WebSocket",
    "background_tasks_param_name": "BackgroundTasks",
    "security_scopes_param_name": "SecurityScopes",
}


class FastAPIResolver:
    """Gives handlers their dependencies with FastAPI's `Depends`, as in endpoints.

        @bus.on(UserCreated)
        async def greet(event: UserCreated, mailer: Annotated[Mailer, Depends(get_mailer)]) -> None:
            await mailer.send(event.email, "Welcome!")

    It is the default resolver of a bus: `EventBus(resolver=...)` replaces it.

    FastAPI itself resolves the dependencies, so all features of `Depends` work: nested
    dependencies, plain `def`s in threads, `yield` with a clean-up that sees the handler's
    exception, the cache and `use_cache=False`. `app.dependency_overrides` are those of the
    application in whose request or lifespan the unit of work was opened. Each delivery gets its own
    dependencies. A `Request` parameter has that application and the state of its lifespan.
    Everything else of a request raises `NoRequestError`.
    """

    def provides(self, parameter: inspect.Parameter) -> bool:
        """Return whether FastAPI declares this parameter, also if only a request can provide it.

        Args:
            parameter: A parameter of a handler, not the event.
        """
        annotation = getattr(parameter.annotation, "__value__", parameter.annotation)  # PEP 695
        declared = [parameter.default]
        if get_origin(annotation) is Annotated:
            annotation, *metadata = get_args(annotation)
            declared += metadata
        return (
            any(isinstance(thing, _MARKERS) for thing in declared)
            or _is_one_of(annotation, *_TYPES)
            # `compile` refuses these classes, with a message that names the alias.
            or (_is_one_of(annotation, Aliased) and parameter.default is parameter.empty)
        )

    def compile(self, parameters: Sequence[inspect.Parameter]) -> Solver:
        """Let FastAPI analyse the parameters, once for each handler.

        Args:
            parameters: The parameters that FastAPI provides.

        Raises:
            InvalidHandlerError: A parameter, or one of its dependencies, needs a request.
            EventKitError: This release of FastAPI has moved or changed the functions that are used.
        """
        private = _private_functions()
        for parameter in parameters:
            _check(parameter, private)
        dependant = private.get_dependant(path="/", call=_shell(parameters))
        told = set[str]()  # names in the state for which this handler has been warned

        def solver(origin: object) -> AbstractAsyncContextManager[Mapping[str, object]]:
            known = origin if isinstance(origin, Origin) else None
            return _Solution(private, dependant, known, told)

        return solver


def _is_one_of(annotation: object, *classes: type) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, classes)


def _check(parameter: inspect.Parameter, private: _Private) -> None:
    """Refuse a parameter that FastAPI cannot resolve, or can resolve only with a request."""
    shell = _shell([parameter])
    try:
        dependant = private.get_dependant(path="/", call=shell)
    except Exception as error:  # FastAPI also uses assertions
        raise InvalidHandlerError(f"FastAPI cannot resolve {parameter.name!r}: {error}") from error
    for call, what in _needs_of_a_request(dependant):
        where = "" if call is shell else f" of {name_of(call)} ({location_of(call)})"
        raise InvalidHandlerError(
            f"{parameter.name!r} needs {what}{where}, which only a request has. A handler runs "
            "after its request, or without a request: put what the handler needs into the event, "
            "or use another dependency"
        )


class _Solution(AbstractAsyncContextManager[Mapping[str, object]]):
    """The dependencies of one delivery: `__aenter__` makes them, `__aexit__` cleans up.

    FastAPI has one exit stack for the end of the endpoint, and one for the end of the request. A
    handler has only one end, so here both are the same stack, and the clean-up is in reverse order.
    """

    __slots__ = (
        "_dependant",
        "_given",
        "_made",
        "_origin",
        "_private",
        "_stack",
        "_state",
        "_told",
    )

    def __init__(
        self,
        private: _Private,
        dependant: Any,  # FastAPI's own
        origin: Origin | None,
        told: set[str],
    ) -> None:
        self._private = private
        self._dependant = dependant
        self._origin = origin
        self._told = told
        self._stack = AsyncExitStack()
        self._given: Mapping[str, Any] = origin.state if origin else {}
        self._state = dict(self._given)  # a copy, as servers make for each request
        self._made: Sequence[str] = ()

    async def __aenter__(self) -> Mapping[str, object]:
        try:
            return await self._solve()
        except BaseException:
            await self._stack.__aexit__(*sys.exc_info())
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        swallowed = await self._stack.__aexit__(exc_type, exc, traceback)
        if self._made:
            self._tell_of_leftovers()
        return swallowed

    def _put_into_state(self) -> list[str]:
        """The names in the state that are new or have another value since the beginning."""
        nothing = object()
        return [n for n, it in self._state.items() if self._given.get(n, nothing) is not it]

    def _tell_of_leftovers(self) -> None:
        """Warn about objects that dependencies have put into the state and have not removed."""
        left = [name for name in self._put_into_state() if name in self._made]
        if left and not self._told.issuperset(left):
            self._told.update(left)
            log(
                logging.WARNING,
                "a dependency left something in the request.state of a handler, which no "
                "middleware commits or closes: use a dependency that cleans up by itself (yield)",
                handler=current_delivery().handler,
                left=", ".join(left),
            )

    async def _solve(self) -> Mapping[str, object]:
        origin, stack = self._origin, self._stack
        scope = _Scope(
            type="http",
            state=self._state,
            eventkit=delivering(),
            # FastAPI 0.121 and later take the stacks from the scope.
            fastapi_inner_astack=stack,
            fastapi_function_astack=stack,
        )
        app = origin and origin.app
        if app is not None:
            scope["app"] = app
        values, errors = await self._private.solve(
            _HandlerRequest(scope, _receive_nothing),
            self._dependant,
            app if isinstance(app, fastapi.FastAPI) else None,  # others know no overrides
            stack,
        )
        if errors:
            raise NoRequestError("valid parameters for an overriding dependency")
        self._made = self._put_into_state()
        return values


def _shell(parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """A function whose signature has these parameters."""

    def shell(**_: object) -> None:
        """It is never called."""

    by_name = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
    shell.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
    return shell


def _needs_of_a_request(
    dependant: Any,  # FastAPI's own
) -> Iterator[tuple[Callable[..., object], str]]:
    """The parameters that only a request can provide, each with the callable that has it."""
    call = dependant.call
    for attribute, kind in _FIELDS.items():
        for field in getattr(dependant, attribute):
            yield call, f"the {kind} {field.name!r}"
    for attribute, kind in _OBJECTS.items():
        if name := getattr(dependant, attribute):
            yield call, f"the {kind} {name!r}"
    if isinstance(call, SecurityBase):
        yield cast("Any", call), "the credentials"  # all security classes are callable
    for dependency in dependant.dependencies:
        yield from _needs_of_a_request(dependency)


class _Absent(Mapping[str, Any]):
    """A missing part of a request. It raises when it is read, not when FastAPI passes it on."""

    def __init__(self, part: str) -> None:
        self._part = part

    def __getitem__(self, key: str) -> NoReturn:
        raise NoRequestError(self._part)

    def __iter__(self) -> NoReturn:
        raise NoRequestError(self._part)

    def __len__(self) -> NoReturn:
        raise NoRequestError(self._part)

    def __getattr__(self, name: str) -> NoReturn:
        raise NoRequestError(self._part)


_HEADERS = cast("Headers", _Absent("headers"))
_QUERY = cast("QueryParams", _Absent("query parameters"))
_PATH = cast("dict[str, Any]", _Absent("path parameters"))
_COOKIES = cast("dict[str, str]", _Absent("cookies"))


class _HandlerRequest(Request):
    """The `Request` of a handler: an application and its state, but no request."""

    @property
    def headers(self) -> Headers:
        return _HEADERS

    @property
    def query_params(self) -> QueryParams:
        return _QUERY

    @property
    def path_params(self) -> dict[str, Any]:
        return _PATH

    @property
    def cookies(self) -> dict[str, str]:
        return _COOKIES

    @property
    def session(self) -> NoReturn:
        raise NoRequestError("session")

    @property
    def auth(self) -> NoReturn:
        raise NoRequestError("auth")

    @property
    def user(self) -> NoReturn:
        raise NoRequestError("user")

    @property
    def state(self) -> State:
        return _HandlerState(self.scope["state"])


class _HandlerState(State):
    """The state of a handler's `Request`; it has nothing from middlewares of requests."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise _NoStateError(f"state.{name}") from None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class _NoStateError(NoRequestError, AttributeError, KeyError):
    """Has these base classes so that `hasattr`, `getattr` and `except` work as in an endpoint."""

    __str__ = Exception.__str__  # a `KeyError` shows its message in quotes


class _HandlerResponse(Response):
    """Passed to FastAPI as the response, so that FastAPI does not make one."""

    def __init__(self) -> None:
        """Set no attributes."""

    def __getattr__(self, name: str) -> NoReturn:
        raise NoRequestError("response")


_RESPONSE = _HandlerResponse()


class _Scope(dict[str, Any]):
    """The scope of a handler's `Request`; a missing key is something that only requests have."""

    def __missing__(self, key: str) -> NoReturn:
        raise NoRequestError(key)


async def _receive_nothing() -> Message:
    raise NoRequestError("body")


@dataclass(frozen=True, slots=True)
class _Private:
    """The private functions of FastAPI, with the same signature for all releases."""

    get_dependant: Callable[..., Any]  # it returns a private class of FastAPI
    solve: Callable[
        [Request, Any, fastapi.FastAPI | None, AsyncExitStack],
        Awaitable[tuple[Mapping[str, object], Sequence[object]]],
    ]


@cache
def _private_functions() -> _Private:
    """Look up the private functions.

    Raises:
        EventKitError: FastAPI has moved or changed them.
    """
    try:
        from fastapi.dependencies import utils

        get_dependant, solve_dependencies = utils.get_dependant, utils.solve_dependencies
    except (ImportError, AttributeError) as error:
        raise EventKitError(_MOVED.format(fastapi.__version__, error)) from error
    known = inspect.signature(solve_dependencies).parameters.keys()
    if missing := _REQUIRED - known:
        raise EventKitError(_MOVED.format(fastapi.__version__, f"no {sorted(missing)}"))
    passed = _REQUIRED | (_OPTIONAL & known)

    async def solve(
        request: Request, dependant: Any, app: fastapi.FastAPI | None, stack: AsyncExitStack
    ) -> tuple[Mapping[str, object], Sequence[object]]:
        given: dict[str, Any] = {
            "request": request,
            "dependant": dependant,
            "response": _RESPONSE,
            "dependency_overrides_provider": app,
            "async_exit_stack": stack,
            "embed_body_fields": False,
        }
        solved: Any = await solve_dependencies(**{name: given[name] for name in passed})
        # Up to FastAPI 0.112.2 it is a tuple.
        return (
            (solved.values, solved.errors) if hasattr(solved, "values") else (solved[0], solved[1])
        )

    return _Private(get_dependant, solve)


_REQUIRED = {"request", "dependant", "response", "dependency_overrides_provider"}
_OPTIONAL = {"async_exit_stack", "embed_body_fields"}  # not in all releases of FastAPI
_MOVED = (
    "FastAPI {} has moved or changed what eventkit uses to resolve the dependencies of handlers "
    "({}): upgrade eventkit, or install an earlier FastAPI"
)
