"""PgBouncer in transaction mode: each transaction may have another server connection."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.conftest import require
from tests.crash.cluster import HOST, USER, Cluster, free_port
from tests.crash.conftest import Place
from tests.crash.nursery import PATIENCE
from tests.crash.test_leases import finish


@pytest.fixture(scope="module")
def bouncer(server: Cluster) -> Iterator[int]:
    """A PgBouncer before the tests' server; its port."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        require("pgbouncer is not installed")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="eventkit_bouncer_") as name:
        folder = Path(name)
        (folder / "users").write_text(f'"{USER}" ""\n')
        (folder / "ini").write_text(
            f"""[databases]
* = host={HOST} port={server.port} user={USER}
[pgbouncer]
listen_addr = {HOST}
listen_port = {port}
unix_socket_dir =
auth_type = any
auth_file = {folder / "users"}
pool_mode = transaction
default_pool_size = 4
max_client_conn = 100
logfile = {folder / "log"}
"""
        )
        user = None
        if os.geteuid() == 0:
            user = USER
            shutil.chown(folder, user)
        process = subprocess.Popen([str(program), str(folder / "ini")], user=user)
        deadline = time.monotonic() + PATIENCE
        while not answers(port):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield port
        process.terminate()
        process.wait(PATIENCE)


def test_deliveries_are_kept_and_recovered_through_a_bouncer(postgres: Place, bouncer: int) -> None:
    place = postgres
    url = make_url(place.workers.url).set(port=bouncer).update_query_dict({"bouncer": "yes"})
    through = url.render_as_string(False)
    first = place.workers.start("--holds", url=through)
    other = place.workers.start(url=through)
    other.hear("ready")
    for number in range(20):
        first.tell("commit", id=f"{number}")
        other.tell("commit", id=f"other {number}")
    first.hear("waits", 2)
    other.hear("done", 20)
    first.hear("done", 20)
    first.kill()
    finish(place, other)
    found = place.count()
    assert (found.business, found.missing, found.phantom) == (40, [], [])
    assert found.twice["exact"] == 0
    assert found.twice["plain"] <= other.lost()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
