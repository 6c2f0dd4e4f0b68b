"""SQLModel: what a `Session` commits is delivered, and what it rolls back is not.

    uvicorn examples.sqlmodel_app:app

    curl -X POST localhost:8000/heroes -H 'content-type: application/json' -d '{"name": "Ada"}'
    curl localhost:8000/diary                     # a handler has written it, in its own session
    curl -X POST localhost:8000/heroes -H 'content-type: application/json' -d '{"name": "Ada"}'
    curl localhost:8000/diary                     # 409: the name is taken, and nothing is new

One line ties the engine to the bus: `deliver_on_commit(bus, engine)`. Endpoints and handlers use
SQLModel as its documentation shows it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlmodel import Field, Session, SQLModel, create_engine, select

from eventkit import DomainEvent, EventBus, EventRouter
from eventkit.fastapi import Bus
from eventkit.sqlalchemy import deliver_on_commit
from eventkit.starlette import EventContextMiddleware


class HeroIn(SQLModel):
    """What a client sends."""

    name: str = Field(min_length=1)


class Hero(HeroIn, table=True):
    """A row."""

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True)


class DiaryEntry(SQLModel, table=True):
    """What a handler writes."""

    id: int | None = Field(default=None, primary_key=True)
    text: str


@dataclass(frozen=True, slots=True)
class HeroCreated(DomainEvent):
    """A hero has joined.

    It carries the id and no `Hero`: the session of a model is closed when handlers run.
    """

    hero_id: int


def get_session(request: Request) -> Generator[Session]:
    """Give a session; an endpoint, and each delivery to a handler, has its own."""
    engine: Engine = request.app.state.engine
    with Session(engine) as session:
        yield session


SessionDep = Annotated[Session, Depends(get_session)]
router = EventRouter()


@router.on(HeroCreated)
def write_diary(event: HeroCreated, session: SessionDep) -> None:
    """Write a line about the hero. The row is there: the event's transaction is committed."""
    hero = session.get_one(Hero, event.hero_id)
    session.add(DiaryEntry(text=f"{hero.name} has joined"))
    session.commit()


def create_app(url: str) -> FastAPI:
    """Make an application with a database and a bus of its own."""
    engine = create_engine(url)
    bus = EventBus()
    bus.include(router)
    deliver_on_commit(bus, engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        SQLModel.metadata.create_all(engine)
        yield
        engine.dispose()  # the last handler has ended

    app = FastAPI(title="Heroes", lifespan=lifespan)
    app.state.engine = engine
    app.add_middleware(EventContextMiddleware, bus=bus)

    @app.post("/heroes", status_code=201)
    def create_hero(data: HeroIn, session: SessionDep, events: Bus) -> Hero:
        hero = Hero.model_validate(data)
        session.add(hero)
        try:
            session.flush()  # gives the hero its id
        except IntegrityError:
            raise HTTPException(409, f"{data.name} is here already") from None
        assert hero.id is not None
        events.publish(HeroCreated(hero.id))
        session.commit()  # decides: the event will be delivered
        session.refresh(hero)
        return hero

    @app.get("/heroes")
    def heroes(session: SessionDep) -> Sequence[Hero]:
        return session.exec(select(Hero)).all()

    @app.get("/diary")
    def diary(session: SessionDep) -> Sequence[str]:
        return session.exec(select(DiaryEntry.text)).all()

    return app


app = create_app(os.environ.get("DATABASE_URL", "sqlite:///heroes.db"))
