"""Owns the tie to SQLAlchemy: an event is delivered if and only if its transaction is committed.

Knows nothing of HTTP. SQLAlchemy's hooks are synchronous and run in whichever thread its session
is used in: they only mark, and no handler runs in them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection, Executable, TextClause, event
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker
from sqlalchemy.orm import (
    Session,
    SessionTransaction,
    scoped_session,
    sessionmaker,
)

from eventkit._bus import EventBus, core_of
from eventkit._context import Section, begin

__all__ = ["CommitTie", "deliver_on_commit"]

# A factory is invariant in the class of its sessions, which does not matter here.
_Factory = sessionmaker[Any] | async_sessionmaker[Any]

# Which buses each factory is tied to. Changed by `CommitTie` alone.
_tied: WeakKeyDictionary[_Factory, set[EventBus]] = WeakKeyDictionary()


def deliver_on_commit(
    bus: EventBus, sessions: _Factory | scoped_session[Any] | async_scoped_session[Any]
) -> CommitTie:
    """Have the transactions of these sessions decide which events are delivered.

        deliver_on_commit(bus, sessions)  # once, where the application is wired

    A commit releases what was published in its transaction, a rollback discards it, and that of a
    savepoint what was published in it, whatever becomes of the unit of work. Delivery itself
    happens when that ends. `even_on_failure=True` goes before all of this.

    An event belongs to the open transaction that the publisher's task has begun last in its unit
    of work, or else to the last one that any task or thread has begun there; with none open, to
    the next one that begins there. If none does, the outcome of the unit decides.

    A transaction that is closed without commit or rollback, or outlives its unit, has lost what
    it wrote, and with it its events; if it wrote nothing, it has no say. Changed objects, other
    statements than SELECT, and asking for `session.connection()` count as writing. A commit that
    raises may have happened all the same: it is in the log, its events are discarded.

    Args:
        bus: The bus whose events they decide. For several, call it for each.
        sessions: A `sessionmaker` or `async_sessionmaker`, or a scoped session of one. What it
            has made before is left alone.

    Returns:
        A handle whose `detach()` ends it; also a context manager.

    Raises:
        TypeError: An argument is something else.
        ValueError: These two are tied already.
    """
    if not isinstance(bus, EventBus):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"deliver_on_commit() takes an EventBus first, not {bus!r}")
    factory = sessions
    if isinstance(factory, scoped_session | async_scoped_session):
        factory = factory.session_factory
    if not isinstance(factory, sessionmaker | async_sessionmaker):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            "deliver_on_commit() takes the sessionmaker or async_sessionmaker that makes the "
            f"application's sessions, not {sessions!r}. Make one of an engine: sessionmaker(engine)"
        )
    if bus in _tied.get(factory, ()):
        raise ValueError(
            f"{bus!r} is tied to {factory!r} already: call deliver_on_commit() once, where the "
            "application is wired"
        )
    return CommitTie(bus, factory)


class CommitTie:
    """The tie between a bus and a session factory; `detach()` ends it. Also a context manager.

    Made by `deliver_on_commit`.
    """

    def __init__(self, bus: EventBus, factory: _Factory) -> None:
        self._bus = bus
        self._factory = factory
        self._replaced = _session_class(factory)
        self._watching = self._subclass(self._replaced)
        self._hooks: dict[str, Callable[..., None]] = {
            "after_transaction_create": self._began,
            "before_commit": self._committing,
            "after_commit": self._committed,
            "after_rollback": self._rolled_back,
            "after_transaction_end": self._ended,
        }
        for name, hook in self._hooks.items():
            event.listen(self._watching, name, hook)
        _use_session_class(factory, self._watching)
        _tied.setdefault(factory, set()).add(bus)

    def detach(self) -> None:
        """Have its transactions decide nothing any more.

        One that is open counts as closed without a commit.
        """
        if self._bus in _tied[self._factory]:
            _tied[self._factory].remove(self._bus)
            for name, hook in self._hooks.items():
                event.remove(self._watching, name, hook)
            if _session_class(self._factory) is self._watching:
                _use_session_class(self._factory, self._replaced)

    def __enter__(self) -> CommitTie:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _subclass(self, configured: type[Session]) -> type[Session]:
        """A class for the factory's sessions alone, which sees what no hook tells.

        SQLAlchemy's hook for statements would cost each of them 20 µs.
        """

        def executing(method: Callable[..., Any]) -> Callable[..., Any]:
            def execute(session: Session, statement: object, *args: Any, **options: Any) -> Any:
                try:
                    return method(session, statement, *args, **options)
                finally:
                    if not _selects(statement):
                        self._wrote(session)

            return execute

        def connection(session: Session, *args: Any, **options: Any) -> Connection:
            connection = configured.connection(session, *args, **options)
            self._wrote(session)  # as far as anyone can know
            return connection

        def expunge_all(session: Session) -> None:  # the first thing that closing does
            section = self._innermost(session)
            if section is not None and not section.wrote:
                section.wrote = _dirty(session)
            configured.expunge_all(session)

        members: dict[str, object] = {
            name: executing(getattr(configured, name)) for name in ("execute", "scalar", "scalars")
        }
        members |= {"connection": connection, "expunge_all": expunge_all}
        return type(configured.__name__, (configured,), members)

    def _open(self, session: Session) -> list[Section | None]:
        """The session's transaction and the savepoints in it, innermost last.

        None stands for one that no unit of work knows.
        """
        sections: list[Section | None] = session.info.setdefault(self, [])
        return sections

    def _innermost(self, session: Session) -> Section | None:
        sections = self._open(session)
        return sections[-1] if sections else None

    def _wrote(self, session: Session) -> None:
        section = self._innermost(session)
        if section is not None:
            section.wrote = True

    def _began(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is not None and not transaction.nested:
            self._wrote(session)  # it is part of a flush, or of one of the bulk methods
            return
        sections = self._open(session)
        if transaction.parent is None:
            _close(sections)  # left where a connection was lost while it was being closed
        core, dirty = core_of(self._bus), partial(_dirty, ref(session))
        around = sections[-1] if sections else None
        if transaction.parent is None or around is not None:
            sections.append(begin(core, dirty, around=around))
        else:
            sections.append(None)

    def _committing(self, session: Session) -> None:
        section = self._innermost(session)
        if section is not None and len(self._open(session)) == 1:
            section.in_doubt = True

    def _committed(self, session: Session) -> None:
        section = self._innermost(session)
        if section is not None:
            section.commit()

    def _rolled_back(self, session: Session) -> None:
        section = self._innermost(session)
        if section is not None:
            # What is prepared can be rolled back for sure, and changes are left where the flush
            # that goes before a commit has failed; else it may be the commit itself that failed.
            if session.twophase or _dirty(session):
                section.in_doubt = False
            section.rollback()

    def _ended(self, session: Session, transaction: SessionTransaction) -> None:
        sections = self._open(session)
        if transaction.parent is None:
            _close(sections)
        elif transaction.nested:
            _close(sections, down_to=len(sections) - 1)


def _close(sections: list[Section | None], *, down_to: int = 0) -> None:
    while len(sections) > down_to:
        section = sections.pop()
        if section is not None:
            section.close()


def _dirty(session: Session | ref[Session]) -> bool:
    """Whether it has changes that are still to be flushed."""
    at_hand = session() if isinstance(session, ref) else session
    return at_hand is not None and bool(at_hand.new or at_hand.dirty or at_hand.deleted)


def _selects(statement: object) -> bool:
    if isinstance(statement, TextClause):
        return statement.text.lstrip()[:6].upper() == "SELECT"
    return isinstance(statement, Executable) and statement.is_select


def _session_class(factory: _Factory) -> type[Session]:
    if isinstance(factory, sessionmaker):
        return factory.class_
    configured: type[Session] | None = factory.kw.get("sync_session_class")
    return configured or factory.class_.sync_session_class


def _use_session_class(factory: _Factory, session_class: type[Session]) -> None:
    if isinstance(factory, sessionmaker):
        factory.class_ = session_class
    else:
        factory.configure(sync_session_class=session_class)
