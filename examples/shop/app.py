"""Owns the wiring: which handlers, which routes, which resources make up the shop."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from eventkit.starlette import EventContextMiddleware
from examples.shop.audit import router as audit_handlers
from examples.shop.orders.handlers import router as order_handlers
from examples.shop.orders.routes import router as order_routes
from examples.shop.resources import Resources
from examples.shop.settings import Settings
from examples.shop.users.handlers import router as user_handlers
from examples.shop.users.routes import router as user_routes


def create_app(settings: Settings) -> FastAPI:
    """Build a shop of its own: its bus, its database, its handlers."""
    resources = Resources(settings)

    bus = resources.bus
    bus.include(user_handlers)
    bus.include(order_handlers)
    bus.include(audit_handlers)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with resources.opened():
            yield

    app = FastAPI(title="Shop", lifespan=lifespan)
    app.state.resources = resources
    app.add_middleware(EventContextMiddleware, bus=bus)
    app.include_router(user_routes)
    app.include_router(order_routes)
    if settings.spans:
        # Imported when used: the shop needs no OpenTelemetry.
        from examples.shop.telemetry import instrument_shop

        instrument_shop(app, resources, Path(settings.spans))
    return app
