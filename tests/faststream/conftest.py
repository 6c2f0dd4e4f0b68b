"""Brokers in memory, on asyncio, with pauses that take no time."""

from dataclasses import dataclass, field

import pytest

pytest.importorskip("faststream")
pytest.importorskip("pydantic")

from anyio.lowlevel import checkpoint

from tests.conftest import BACKENDS, CHOSEN, LEFT_OUT, Backend
from tests.faststream.services import KINDS, Kind, Service


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(BACKENDS[name], id=name)
        for name in CHOSEN
        if name not in LEFT_OUT and name != "trio"
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    """Run the test on each event loop but trio, which FastStream does not know."""
    backend: Backend = request.param
    return backend


@dataclass
class Clock:
    """Time that passes where the bridge pauses, and nowhere else."""

    now: float = 0.0
    pauses: list[float] = field(default_factory=list[float])

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        await checkpoint()

    def read(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The pauses of the bridge: none takes time."""
    clock = Clock()
    monkeypatch.setattr("eventkit.faststream._consumer.sleep", clock.sleep)
    monkeypatch.setattr("eventkit.faststream._deliver.sleep", clock.sleep)
    monkeypatch.setattr("eventkit.faststream._deliver.current_time", clock.read)
    return clock


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each of the brokers."""
    kind: Kind = request.param
    return kind


@pytest.fixture
def service(kind: Kind) -> Service:
    """A service on each of the brokers."""
    return Service(kind)
