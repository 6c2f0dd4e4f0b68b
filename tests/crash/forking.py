"""A script that forks once its outbox has been used, and both processes go on with it.

Prints who the parent is, who the child is, and who the parent is afterwards; and their pids.
"""

import os
import signal
import sys

from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from eventkit import EventBus, current_delivery
from eventkit.outbox import Outbox
from tests.crash.tables import Business, Effect
from tests.crash.worker import Happened


def main(url: str, how: str) -> None:
    engine = create_engine(url)
    bus = EventBus()
    outbox = Outbox(bus, engine, lease=1.5)

    @bus.on(Happened, durable=True, name="plain")
    def plain(event: Happened) -> None:
        delivery = current_delivery()
        if event.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        with Session(engine) as session:
            effect = Effect(handler="plain", id=event.id, pid=os.getpid(), attempt=delivery.attempt)
            session.add(effect)
            session.commit()

    commit(bus, engine, "before")
    print(outbox._holdings.lease.owner, flush=True)
    if (pid := os.fork()) == 0:
        engine.dispose(close=False)  # as SQLAlchemy's docs tell
        print(outbox._holdings.lease.owner, flush=True)
        commit(bus, engine, "child", "dies" if how == "killed" else "")
        # Not the interpreter's end, which the parent's finalizers belong to.
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if how == "killed" else 0)
    commit(bus, engine, "after")
    print(outbox._holdings.lease.owner, flush=True)
    print(os.getpid(), pid, file=sys.stderr)


def commit(bus: EventBus, engine: Engine, id: str, how: str = "") -> None:
    with bus.context(), Session(engine) as session:
        session.add(Business(id=id))
        bus.publish(Happened(id, how=how))
        session.commit()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
