"""Owns what a handler takes beside the event, and who is asked for it: a `Resolver`.

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
    """What gives handlers their dependencies: FastAPI where nothing is said, or another container.

    Asked when a handler is subscribed to a bus, or its router is included in one; afterwards only
    the `Solver` is called. It is shown the parameters beside the event, with annotations that have
    been evaluated: a name that does not exist at run time is a `typing.ForwardRef` in them, and
    one that cannot be evaluated at all is a string.
    """

    def provides(self, parameter: inspect.Parameter) -> bool:
        """Say whether this is a dependency. Others keep their default, and have to have one.

        Raises:
            Exception: That cannot be said. The handler's name and place are added to the message.
        """
        ...

    def compile(self, parameters: Sequence[inspect.Parameter]) -> Solver:
        """Prepare for the deliveries to a handler that has these dependencies, one at least.

        Raises:
            Exception: What cannot work. The handler's name and place are added to the message.
        """
        ...


def with_dependencies(
    handler: Handler, resolver: Resolver | None, make_default: Callable[[], Resolver]
) -> Handler:
    """Have the resolver compile what the handler takes beside the event.

    Args:
        handler: As it was declared.
        resolver: Who is asked; None for the default one.
        make_default: Makes that; not called before a handler needs it, for it imports FastAPI.

    Raises:
        InvalidHandlerError: Something that it takes has neither a source nor a default.
    """
    parameters = _beside_the_event(handler.function)
    required = [parameter for parameter in parameters if is_required(parameter)]
    # What FastAPI has to fill is an object of FastAPI's, or has no default.
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
    """What it takes beside the event and what a partial has bound, with annotations evaluated."""
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


def _by_default(
    make_default: Callable[[], Resolver], handler: Handler, parameters: Sequence[str]
) -> Resolver:
    """The resolver of a bus that was given none, which has to be installed."""
    try:
        return make_default()
    except ModuleNotFoundError as error:
        raise InvalidHandlerError(
            f"{handler.place} takes {', '.join(parameters)} beside the event, and what resolves "
            "dependencies is not installed: FastAPI. Install fastapi-eventkit[fastapi], plug in "
            "another container with EventBus(resolver=...), or close over what the handler needs"
        ) from error


def _unprovided(handler: Handler, parameter: inspect.Parameter) -> str:
    text = (
        f"{handler.place} takes {parameter.name!r}, "
        "which is neither the event (that comes first) nor "
    )
    annotation = parameter.annotation
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        return (
            f"{text}seen to be a dependency: its annotation {annotation!r} cannot be evaluated. "
            "Define or import what it names before the handler gets its bus, and not for type "
            "checkers alone"
        )
    return (
        f"{text}a dependency, and has no default. A handler has no request, so neither query, path "
        "nor body: put what it needs into the event, or say where it comes from, with FastAPI "
        f"`{parameter.name}: Annotated[..., Depends(...)]`"
    )


def _check_call(handler: Handler, provided: Sequence[inspect.Parameter]) -> None:
    """Refuse what the dependencies cannot be given to by name."""
    signature = signature_of(handler.function, follow_wrapped=False)
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


class Aliased:
    """A class that FastAPI users name by an alias; as a field of FastAPI's it is refused.

    Attributes:
        alias: What to declare instead.
    """

    __slots__ = ()

    alias: ClassVar[str]

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: object, handler: Callable[[object], object]
    ) -> object:
        """What FastAPI and Pydantic ask, where they take the class for a field of theirs.

        Raises:
            TypeError: Pydantic cannot make one; a model that allows arbitrary types can.
        """
        try:
            return handler(source)
        except Exception as error:  # Pydantic's, which is not imported here
            alias = cls.alias.partition(": ")[2]
            raise TypeError(
                f"{cls.__name__} is no field that FastAPI can read from a request. In an endpoint, "
                f"a dependency or a handler declare `{cls.alias}`: from eventkit.fastapi import "
                f"{alias}. In a model of Pydantic set arbitrary_types_allowed=True"
            ) from error
