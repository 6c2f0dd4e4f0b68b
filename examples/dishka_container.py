"""Another container than FastAPI's: handlers whose dependencies come from dishka.

`DishkaResolver` is all that it takes. Give it to the bus, and `FromDishka[...]` works in handlers:
each delivery has a scope of its own, and what its providers yield is cleaned up when the handler
has ended, knowing whether it failed.

    python -m examples.dishka_container
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
from dishka import (
    AsyncContainer,
    FromDishka,
    Provider,
    Scope,
    from_context,
    make_async_container,
    provide,  # pyright: ignore[reportUnknownVariableType] - dishka leaves a parameter open
)
from dishka.integrations.base import default_parse_dependency

from eventkit import Delivery, EventBus, EventRouter, Solver, current_delivery


class DishkaResolver:
    """Gives handlers what a container of dishka provides. Its providers may ask for `Delivery`."""

    def __init__(self, container: AsyncContainer) -> None:
        self._container = container

    def provides(self, parameter: inspect.Parameter) -> bool:
        """Whether it is declared as `FromDishka[...]`."""
        return default_parse_dependency(parameter, parameter.annotation) is not None

    def compile(self, parameters: Sequence[inspect.Parameter]) -> Solver:
        """Note which name wants what; a type that no provider makes is found at the first call."""
        declared = {p.name: default_parse_dependency(p, p.annotation) for p in parameters}
        keys = {name: key for name, key in declared.items() if key is not None}

        @asynccontextmanager
        async def solver(origin: object) -> AsyncGenerator[Mapping[str, object]]:
            async with self._container({Delivery: current_delivery()}) as scope:
                yield {
                    name: await scope.get(key.type_hint, key.component)
                    for name, key in keys.items()
                }

        return solver


# What follows is the program of somebody who uses it.


@dataclass(frozen=True, slots=True)
class OrderPlaced:
    """An order is complete."""

    number: int


class Ledger:
    """Takes entries, and keeps them when it is committed."""

    def __init__(self, book: list[str], delivery: Delivery) -> None:
        self._book = book
        self._entries: list[str] = []
        self._handler = delivery.handler

    def add(self, entry: str) -> None:
        """Note something for the commit."""
        self._entries.append(entry)

    def commit(self) -> None:
        """Keep what was noted."""
        self._book += [f"{self._handler} wrote {entry}" for entry in self._entries]


class Books(Provider):
    """One book for the program, and a ledger for each delivery."""

    delivery = from_context(Delivery, scope=Scope.REQUEST)

    def __init__(self, book: list[str]) -> None:
        super().__init__()
        self._book = book

    @provide(scope=Scope.REQUEST)
    async def ledger(self, delivery: Delivery) -> AsyncGenerator[Ledger, BaseException | None]:
        """A transaction: dishka sends in what the handler raised."""
        ledger = Ledger(self._book, delivery)
        error = yield ledger
        if error is None:
            ledger.commit()


router = EventRouter()


@router.on(OrderPlaced, name="bookkeeper")
async def book(event: OrderPlaced, ledger: FromDishka[Ledger]) -> None:
    """Write it down."""
    ledger.add(f"order {event.number}")


@router.on(OrderPlaced, name="novice")
def book_badly(event: OrderPlaced, ledger: FromDishka[Ledger]) -> None:
    """Write it down, and then think better of it; a plain `def` has dependencies, too."""
    ledger.add(f"order {event.number}, I think")
    raise ValueError("that was wrong")


async def main(book: list[str]) -> EventBus:
    """Place two orders."""
    container = make_async_container(Books(book))
    bus = EventBus(resolver=DishkaResolver(container))
    bus.include(router)
    async with bus.context():
        bus.publish(OrderPlaced(1), OrderPlaced(2))
    await container.close()
    return bus


if __name__ == "__main__":
    entries: list[str] = []
    print(anyio.run(main, entries).stats)
    print(*entries, sep="\n")
