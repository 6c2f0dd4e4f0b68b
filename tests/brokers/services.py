"""Services within the test's own process: a bus, FastStream's broker and a bridge."""

import logging
from collections.abc import Callable, Generator
from contextlib import AsyncExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import stamina

from eventkit import EventBus
from eventkit.faststream import Bridge
from tests.brokers.happenings import Placed
from tests.brokers.places import Place

# As the default, but for the pauses. The first attempt of five is before them.
SOON = stamina.AsyncRetryingCaller(attempts=4, timeout=None, wait_initial=0.01, wait_max=0.05)


class Service:
    """One service; it runs inside `async with`, and is wired before."""

    def __init__(self, place: Place, name: str = "service") -> None:
        self.place = place
        self.bus = EventBus()
        self.broker: Any = place.kind.broker(place.url)  # Any: each broker has its own class
        self.bridge = Bridge(self.bus, source=f"/{name}")
        self._stack = AsyncExitStack()

    def forward(self, event_type: type, **options: Any) -> None:
        publisher = self.place.kind.publisher(self.broker, self.place.orders)
        self.bridge.forward(event_type, publisher, **options)

    def consume(
        self,
        *event_types: type,
        group: str = "billing",
        returns_after: float = 30.0,
        **options: Any,
    ) -> None:
        kind = self.place.kind
        subscriber = kind.subscriber(
            self.broker, self.place.orders, group, returns_after=returns_after
        )
        if "deliver" not in options:
            options = {"retry": SOON, "within": 0.75 * returns_after, **options}
        dead_letter = options.pop("dead_letter", None)
        if dead_letter is None:
            dead_letter = kind.dead_letters(self.broker, self.place.dead)
        self.bridge.consume(subscriber, *event_types, dead_letter=dead_letter, **options)

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.broker)
        await self.broker.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()


def connected(place: Place, **options: Any) -> tuple[Service, Service]:
    """One that sends `Placed`, and one that consumes it with these options."""
    orders, billing = Service(place, "orders"), Service(place, "billing")
    orders.forward(Placed)
    billing.consume(Placed, **options)
    return orders, billing


@contextmanager
def logged() -> Generator[Callable[[], str]]:
    """All that eventkit logs, tracebacks included, as one text."""
    formatter = logging.Formatter()
    texts: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(f"{formatter.format(record)} {getattr(record, 'eventkit', '')}")

    handler, logger = Keeping(), logging.getLogger("eventkit")
    logger.addHandler(handler)
    try:
        yield lambda: "\n".join(texts)
    finally:
        logger.removeHandler(handler)
