"""Three processes, and what happens to them at random: `--soak SECONDS` says for how long."""

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.crash.conftest import DRIVERS
from tests.crash.nursery import Nursery
from tests.crash.soak import soak


@pytest.mark.parametrize("driver", DRIVERS)
def test_nothing_is_lost_made_up_or_done_exactly_once_twice(
    driver: str,
    tmp_path: Path,
    nursery: Nursery,
    soak_seconds: float,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    server = None if "sqlite" in driver else request.getfixturevalue("server")
    name = "" if server is None else server.new_database()
    url = f"sqlite:///{tmp_path / 'soak.db'}" if server is None else server.url(name)
    report = soak(
        make_url(url).render_as_string(False), driver, soak_seconds, server=server, nursery=nursery
    )
    record_property("soak", f"{driver}: {report}")
    assert not report.problems(), str(report)
    assert report.count is not None
    assert report.count.business
