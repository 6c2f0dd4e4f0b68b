"""Owns the parameters of a handler beside the event, and the `Resolver` that provides them.

Knows no container.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, ClassVar, ForwardRef, Protocol, runtime_checkable

from eventkit._core.handlers import (
    STARS,
    Handler,
    Solver,
    is_required,
    layers,
    signature_of,
    takes_the_event_alone,
)
from eventkit.exceptions import InvalidHandlerError


@runtime_checkable
class Resolver(Protocol):
    """The protocol of an object that gives handlers their dependencies.

        bus = EventBus(resolver=ContainerResolver(container))

    By default a bus uses FastAPI. Implement this protocol for another container. The bus calls a
    resolver when a handler is subscribed, or when its router is included. Each delivery then calls
    only the `Solver` that `compile` returned.

    The resolver gets the parameters of a handler beside the event. Their annotations are evaluated.
    A name that does not exist at run time is a `typing.ForwardRef`. An annotation that cannot be
    evaluated at all is a string.
    """

    def provides(self, parameter: inspect.Parameter) -> bool:
        """Say whether the resolver provides this parameter.

        A parameter that the resolver does not provide keeps its default value. Without a default,
        the handler is refused with an `InvalidHandlerError`.

        Args:
            parameter: A parameter of a handler, not the event.

        Raises:
            Exception: The parameter cannot be judged. It becomes an `InvalidHandlerError` whose
                message also has the handler's name and place.
        """
        ...

    def compile(self, parameters: Sequence[inspect.Parameter]) -> Solver:
        """Prepare the deliveries to a handler, and return the solver for them.

        Args:
            parameters: The parameters that the resolver provides, at least one.

        Raises:
            Exception: The dependencies cannot be provided. It becomes an `InvalidHandlerError`
                whose message also has the handler's name and place.
        """
        ...


def with_dependencies(
    handler: Handler, resolver: Resolver | None, make_default: Callable[[], Resolver]
) -> Handler:
    """Have the resolver compile the parameters of the handler beside the event.

    Args:
        handler: The handler as it was declared.
        resolver: The resolver; None for the default one.
        make_default: Makes the default resolver. It imports FastAPI, so it is called only if a
            handler needs it.

    Raises:
        InvalidHandlerError: A parameter is not provided and has no default.
    """
    parameters = _beside_the_event(handler.function)
    required = [parameter for parameter in parameters if is_required(parameter)]
    # A parameter that FastAPI provides has no default, or has a default from FastAPI: then FastAPI
    # has been imported.
    if resolver is None and parameters and (required or "fastapi" in sys.modules):
        names = [parameter.name for parameter in required or parameters]
        resolver = _by_default(make_default, handler, names)
    if resolver is None:
        return handler
    try:
        provided = [parameter for parameter in parameters if resolver.provides(parameter)]
    except Exception as error:
        raise InvalidHandlerError(f"{handler.place}: {error}") from error
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
    """Its parameters beside the event, except those that a partial binds; annotations evaluated."""
    signature = None if takes_the_event_alone(function) else signature_of(function)
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
        if parameter.name not in bound and parameter.kind not in STARS
    ]


def _evaluated(annotation: object, namespace: dict[str, Any]) -> object:
    """Evaluate a postponed annotation; names that only type checkers know become a `ForwardRef`.

    An annotation that cannot be evaluated in this way stays a string.
    """
    missing: dict[str, object] = {}
    while isinstance(annotation, str):
        try:
            annotation = eval(annotation, namespace, missing)
        except Exception as error:  # noqa: BLE001 - an annotation is user code
            name = error.name if isinstance(error, NameError) else None
            if name is None or name in missing:
                break
            missing[name] = ForwardRef(name)
    return annotation


def _by_default(
    make_default: Callable[[], Resolver], handler: Handler, parameters: Sequence[str]
) -> Resolver:
    """Make the default resolver, which needs FastAPI."""
    try:
        return make_default()
    except ModuleNotFoundError as error:
        raise InvalidHandlerError(
            f"{handler.place} takes {', '.join(parameters)} beside the event, but FastAPI, which "
            "provides dependencies by default, is not installed. Install "
            "fastapi-eventkit[fastapi], use another container with EventBus(resolver=...), or "
            "remove the parameters"
        ) from error


def _unprovided(handler: Handler, parameter: inspect.Parameter) -> str:
    text = (
        f"{handler.place} takes {parameter.name!r}, "
        "which is neither the event (the first parameter) nor "
    )
    annotation = parameter.annotation
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        return (
            f"{text}known to be a dependency: its annotation {annotation!r} cannot be evaluated. "
            "Define or import this name before the handler is subscribed or its router included, "
            "and not only for type checkers"
        )
    return (
        f"{text}a dependency, and has no default. A handler has no request, so it has no query, no "
        "path and no body. Put what the handler needs into the event, or declare a dependency, "
        f"with FastAPI `{parameter.name}: Annotated[..., Depends(...)]`"
    )


def _check_call(handler: Handler, provided: Sequence[inspect.Parameter]) -> None:
    """Refuse a callable that does not accept its dependencies as keyword arguments."""
    signature = signature_of(handler.function, follow_wrapped=False)
    names = [parameter.name for parameter in provided]
    try:
        if signature is not None:
            signature.bind(object(), **dict.fromkeys(names))
    except TypeError as error:
        raise InvalidHandlerError(
            f"{handler.place} cannot be given its dependencies {', '.join(names)} as keyword "
            f"arguments: {error}. A decorator has to pass on all arguments: "
            "`def wrapper(*args, **kwargs)`. A dependency cannot be positional-only"
        ) from None


class Aliased:
    """A class for which FastAPI users declare an alias; the class itself is refused as a field.

    Attributes:
        alias: The parameter to declare instead.
    """

    __slots__ = ()

    alias: ClassVar[str]

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: object, handler: Callable[[object], object]
    ) -> object:
        """Refuse the class as a field of FastAPI or Pydantic, with a message that helps.

        Raises:
            TypeError: Pydantic cannot make a field. It can if a model allows arbitrary types.
        """
        try:
            return handler(source)
        except Exception as error:  # Pydantic's, which is not imported here
            alias = cls.alias.partition(": ")[2]
            raise TypeError(
                f"FastAPI cannot read a field of the type {cls.__name__} from a request. In an "
                f"endpoint, a dependency or a handler declare `{cls.alias}`: from eventkit.fastapi "
                f"import {alias}. In a model of Pydantic set arbitrary_types_allowed=True"
            ) from error
