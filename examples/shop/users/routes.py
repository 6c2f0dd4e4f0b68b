"""Owns the way from HTTP to the use cases for users, and the answers back."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException
from pydantic import BaseModel

from examples.shop.resources import Events, Transaction
from examples.shop.users.storage import SqlUsers
from examples.shop.users.usecases import CreateUser, EmailTaken

router = APIRouter()


class SignUp(BaseModel):
    """What a person tells us."""

    name: str
    email: str


class SignedUp(BaseModel):
    """What we answer."""

    user_id: int


def get_create_user(session: Transaction, events: Events) -> CreateUser:
    """The use case, with what this request gives it to work with."""
    return CreateUser(SqlUsers(session), events)


@router.post("/users", status_code=201)
def sign_up(form: SignUp, create_user: Annotated[CreateUser, Depends(get_create_user)]) -> SignedUp:
    """Sign up; a plain `def`, because its session blocks. The answer waits for no welcome mail."""
    try:
        return SignedUp(user_id=create_user.execute(form.name, form.email))
    except EmailTaken as error:
        raise HTTPException(409, str(error)) from error
