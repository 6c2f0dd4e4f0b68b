"""What FastAPI users have: its `Depends` in handlers, and aliases for the bus and its context."""

from __future__ import annotations

from typing import Annotated

from eventkit.exceptions import BusLookupError, not_installed

try:
    from fastapi import Depends
except ModuleNotFoundError as _missing:
    raise not_installed(__name__, "fastapi", "fastapi") from _missing
from starlette.requests import HTTPConnection

from eventkit._core.bus import EventBus
from eventkit._core.context import EventContext
from eventkit._core.depends import FastAPIResolver

__all__ = ["Bus", "CurrentContext", "FastAPIResolver", "get_bus", "get_context"]


async def get_bus(connection: HTTPConnection) -> EventBus:
    """The bus whose middleware the request or websocket came through; in a handler, its own.

    The dependency behind `Bus`, to be named in `app.dependency_overrides`.

    Raises:
        BusLookupError: There is none, or there are several.
    """
    buses = list[EventBus](connection.scope.get("eventkit", ()))
    if len(buses) == 1:
        return buses[0]
    if not buses:
        raise BusLookupError(
            "no EventContextMiddleware has seen this request: "
            "app.add_middleware(EventContextMiddleware, bus=bus)"
        )
    raise BusLookupError(
        f"this application has {len(buses)} buses, {', '.join(repr(bus.name) for bus in buses)}, "
        "and Bus and CurrentContext stand for the only one. Write aliases of your own:\n"
        "    async def get_orders_bus() -> EventBus:\n"
        "        return orders_bus\n"
        "    OrdersBus = Annotated[EventBus, Depends(get_orders_bus)]\n"
        "and for a context one that returns orders_bus.current_context()"
    )


Bus = Annotated[EventBus, Depends(get_bus)]
"""The bus of the application, as a parameter of an endpoint or a handler: `events: Bus`."""


async def get_context(bus: Bus) -> EventContext:
    """The active unit of work of that bus: the request's, or in a handler the delivery's.

    The dependency behind `CurrentContext`, to be named in `app.dependency_overrides`.

    Raises:
        BusLookupError: There is no bus, or there are several.
        NoEventContextError: In a websocket, which opens one for each message.
    """
    return bus.current_context()


CurrentContext = Annotated[EventContext, Depends(get_context)]
"""The active event context of that bus, as a parameter: `context: CurrentContext`."""
