"""Two services and a broker, killed at random: `--soak SECONDS` says for how long."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.brokers.conftest import OwnServers, param_of_own
from tests.brokers.kinds import KINDS
from tests.brokers.places import Place, place_on
from tests.brokers.servers import SERVERS
from tests.brokers.soak import Soak
from tests.crash.nursery import Nursery


@pytest.fixture(params=[param_of_own(name) for name in SERVERS])
def soaked(request: pytest.FixtureRequest, own_servers: OwnServers) -> Iterator[Place]:
    """On each broker, with another program than other tests."""
    name: str = request.param
    server = own_servers.get(name)
    nursery = Nursery("tests.brokers.shop")
    with place_on(KINDS[name], server.url, lambda: nursery, server) as made:
        yield made
        server.resume()
    nursery.close()


def test_each_order_that_was_committed_has_its_effect_exactly_once(
    soaked: Place,
    tmp_path: Path,
    soak_seconds: float,
    record_property: Callable[[str, object], None],
) -> None:
    report = Soak(soaked, tmp_path, soak_seconds).run()
    record_property("soak", f"{soaked.kind.name}: {report}")
    assert not report.problems(), str(report)
    assert report.orders
