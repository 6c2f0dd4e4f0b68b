"""Channels of its own for each test, on each broker; and brokers that tests may kill."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

pytest.importorskip("faststream")

from tests.brokers.kinds import KINDS
from tests.brokers.places import Place, place_on
from tests.brokers.servers import SERVERS, Server, own
from tests.conftest import SERVICES, require
from tests.crash.cluster import Missing
from tests.crash.nursery import Nursery

ServiceUrl = Callable[[str], str]


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """FastStream runs on asyncio alone."""
    return "asyncio", {"use_uvloop": False}


@pytest.fixture(scope="session")
def nursery() -> Iterator[Callable[[], Nursery]]:
    """Give the maker of processes, which is started when the first test asks."""
    made: list[Nursery] = []

    def get() -> Nursery:
        if not made:
            made.append(Nursery("tests.brokers.worker"))
        return made[0]

    yield get
    for each in made:
        each.close()


class OwnServers:
    """Brokers of this session, started when the first test asks."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self._started: dict[str, Server] = {}

    def get(self, name: str) -> Server:
        if name not in self._started:
            try:
                self._started[name] = self.stack.enter_context(own(name))
            except Missing as error:
                require(str(error))
        return self._started[name]


@pytest.fixture(scope="session")
def own_servers() -> Iterator[OwnServers]:
    servers = OwnServers()
    with servers.stack:
        yield servers


@pytest.fixture(scope="session")
def broker_url(service_url: ServiceUrl, own_servers: OwnServers) -> ServiceUrl:
    """Give the URL of the broker that all share, or else of an own one, as always for Kafka."""

    def find(name: str) -> str:
        name = name.removesuffix("-pull")
        if name == "kafka" or (not is_there(name) and is_installed(name)):
            return own_servers.get(name).url
        return service_url(name)

    return find


def is_there(name: str) -> bool:
    """Whether it is asked for, or answers where it usually is."""
    variable, default = SERVICES[name]
    address = urlsplit(default)
    return variable in os.environ or answers(address.hostname or "", address.port or 0)


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def is_installed(name: str) -> bool:
    try:
        SERVERS[name].find()
    except Missing:
        return False
    return True


def on_each(fact: str) -> pytest.MarkDecorator:
    """Run a test on those brokers of which this is true."""
    return pytest.mark.parametrize(
        "place", [name for name, kind in KINDS.items() if getattr(kind, fact)], indirect=True
    )


@pytest.fixture(params=[*KINDS])
def place(
    request: pytest.FixtureRequest, broker_url: ServiceUrl, nursery: Callable[[], Nursery]
) -> Iterator[Place]:
    """On each broker."""
    name: str = request.param
    with place_on(KINDS[name], broker_url(name), nursery) as made:
        yield made


def param_of_own(name: str) -> object:
    """Have all tests that kill this broker on one worker, which starts one for them."""
    return pytest.param(name, marks=pytest.mark.xdist_group(f"own {name}"))


def on_each_own(fact: str) -> pytest.MarkDecorator:
    """Run a test on those brokers of its own of which this is true."""
    names = [name for name, server in SERVERS.items() if getattr(server, fact)]
    return pytest.mark.parametrize("own_place", [*map(param_of_own, names)], indirect=True)


@pytest.fixture(params=[param_of_own(name) for name in SERVERS])
def own_place(
    request: pytest.FixtureRequest, own_servers: OwnServers, nursery: Callable[[], Nursery]
) -> Iterator[Place]:
    """On each broker, which the test may kill."""
    name: str = request.param
    server = own_servers.get(name)
    with place_on(KINDS[name], server.url, nursery, server) as made:
        yield made
        server.resume()
