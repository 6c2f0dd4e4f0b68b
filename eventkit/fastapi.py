"""Aliases for FastAPI: `Bus` and `CurrentContext` in endpoints, `Depends` in handlers.

    from eventkit.fastapi import Bus

    @app.post("/orders")
    async def place_order(events: Bus) -> None:
        events.publish(OrderPlaced(1))

The two aliases work in endpoints, in dependencies and in handlers. They stand for the only bus of
the application. Handlers declare their dependencies as endpoints do: see `FastAPIResolver`.
"""

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
    """Return the only bus of the application; in a handler, the bus of the handler.

    This is the dependency behind `Bus`. Name it as a key in `app.dependency_overrides`. The bus is
    the one of the `EventContextMiddleware` that the request or websocket has passed.

    Args:
        connection: The request or websocket. FastAPI passes it.

    Raises:
        BusLookupError: The application has no bus, or several.
    """
    buses = list[EventBus](connection.scope.get("eventkit", ()))
    if len(buses) == 1:
        return buses[0]
    if not buses:
        raise BusLookupError(
            "this request has not passed an EventContextMiddleware. Add one: "
            "app.add_middleware(EventContextMiddleware, bus=bus)"
        )
    raise BusLookupError(
        f"this application has {len(buses)} buses, {', '.join(repr(bus.name) for bus in buses)}, "
        "but Bus and CurrentContext need exactly one. Write your own aliases:\n"
        "    async def get_orders_bus() -> EventBus:\n"
        "        return orders_bus\n"
        "    OrdersBus = Annotated[EventBus, Depends(get_orders_bus)]\n"
        "For the context, write an alias in the same way that returns orders_bus.current_context()"
    )


Bus = Annotated[EventBus, Depends(get_bus)]
"""The bus of the application, as a parameter of an endpoint or a handler: `events: Bus`."""


async def get_context(bus: Bus) -> EventContext:
    """Return the active event context: that of the request, or in a handler that of the delivery.

    This is the dependency behind `CurrentContext`. Name it as a key in `app.dependency_overrides`.

    Args:
        bus: The bus. FastAPI passes it.

    Raises:
        BusLookupError: The application has no bus, or several.
        NoEventContextError: The caller is in a websocket, outside of `bus.context()`. A websocket
            has no context of its own: it opens one for each message.
    """
    return bus.current_context()


CurrentContext = Annotated[EventContext, Depends(get_context)]
"""The active event context of that bus, as a parameter: `context: CurrentContext`."""
