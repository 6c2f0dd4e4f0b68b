"""Owns the way from HTTP to the use cases for orders, and the answers back."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Response
from pydantic import BaseModel, Field

from examples.shop.orders.storage import SqlOrders
from examples.shop.orders.usecases import Declined, Line, OutOfStock, PlaceOrder, Reserve
from examples.shop.resources import Events, FromApp, Transaction

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


class Checked(BaseModel):
    """What we answer to somebody who only asks."""

    possible: bool


class ReservationForm(BaseModel):
    """Who wants one of what."""

    email: str
    sku: str


class Reserved(BaseModel):
    """What became of it."""

    reserved: bool
    waiting: bool


def get_place_order(session: Transaction, events: Events, resources: FromApp) -> PlaceOrder:
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


@router.post("/orders/check")
def check_order(
    form: OrderForm,
    use_case: Annotated[PlaceOrder, Depends(get_place_order)],
    session: Transaction,
) -> Checked:
    """Say whether this order could be placed: it is placed for a moment, and rolled back.

    The answer is 200 and nothing has happened, so no handler hears of it.
    """
    try:
        use_case.execute(form.email, [Line(line.sku, line.quantity) for line in form.lines])
    except OutOfStock:
        return Checked(possible=False)
    except Declined as error:
        raise HTTPException(402, str(error)) from error
    finally:
        session.rollback()
    return Checked(possible=True)


def get_reserve(session: Transaction, events: Events) -> Reserve:
    """The use case, with what this request gives it to work with."""
    return Reserve(SqlOrders(session), events)


@router.post("/reservations", status_code=201)
def reserve(
    form: ReservationForm, use_case: Annotated[Reserve, Depends(get_reserve)], response: Response
) -> Reserved:
    """Put one aside; with none left the answer is 409, and whoever asked is on the waiting list.

    That is committed, so handlers hear of it although the answer is an error.
    """
    reserved = use_case.execute(form.email, form.sku)
    if not reserved:
        response.status_code = 409
    return Reserved(reserved=reserved, waiting=not reserved)
