"""Owns the way from HTTP to the use cases for orders, and the answers back."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException
from pydantic import BaseModel, Field

from examples.shop.orders.storage import SqlOrders
from examples.shop.orders.usecases import Declined, Line, OutOfStock, PlaceOrder
from examples.shop.resources import Events, FromApp, SyncTransaction

router = APIRouter()


class LineForm(BaseModel):
    """How many of what."""

    sku: str
    quantity: int = Field(ge=1)


class OrderForm(BaseModel):
    """Who wants what."""

    email: str
    lines: list[LineForm]


class Ordered(BaseModel):
    """What we answer."""

    order_id: int


def get_place_order(session: SyncTransaction, events: Events, resources: FromApp) -> PlaceOrder:
    """The use case, with what this request gives it to work with."""
    return PlaceOrder(SqlOrders(session), events, resources.settings.credit_limit_cents)


@router.post("/orders", status_code=201)
def place_order(
    form: OrderForm, use_case: Annotated[PlaceOrder, Depends(get_place_order)]
) -> Ordered:
    """Order; a plain `def`, because its session blocks, and it publishes all the same."""
    lines = [Line(line.sku, line.quantity) for line in form.lines]
    try:
        return Ordered(order_id=use_case.execute(form.email, lines))
    except OutOfStock as error:
        raise HTTPException(409, str(error)) from error
    except Declined as error:
        raise HTTPException(402, str(error)) from error
