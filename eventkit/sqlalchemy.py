"""Owns the tie to SQLAlchemy: an event is delivered if and only if its transaction is committed.

Knows nothing of HTTP. SQLAlchemy's hooks are synchronous and run in whichever thread its session
is used in: they only mark, and no handler runs in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

try:
    from sqlalchemy import Executable, TextClause, event
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        f"eventkit.sqlalchemy needs {_missing.name}, which is not installed: install "
        "fastapi-eventkit[sqlalchemy]",
        name=_missing.name,
    ) from _missing
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, SessionTransaction, scoped_session, sessionmaker

from eventkit._core.bus import EventBus, state_of
from eventkit._core.transactions import Section, begin

__all__ = ["CommitTie", "deliver_on_commit"]

# A factory is invariant in the class of its sessions, which does not matter here.
_Factory = sessionmaker[Any] | async_sessionmaker[Any]

# The bus that each class of sessions was made for. Changed by `CommitTie` alone.
_tied: WeakKeyDictionary[type, EventBus] = WeakKeyDictionary()


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
    if any(_tied.get(each) is bus for each in _session_class(factory).__mro__):
        raise ValueError(
            f"{bus!r} is tied to {factory!r} already: call deliver_on_commit() once, where the "
            "application is wired"
        )
    return CommitTie(bus, factory)


class CommitTie:
    """What `deliver_on_commit` has tied, until `detach()`. Also a context manager."""

    def __init__(self, bus: EventBus, factory: _Factory) -> None:
        self._state = state_of(bus)
        self._factory = factory
        self._watching = self._subclass(_session_class(factory))
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
        _tied[self._watching] = bus

    def detach(self) -> None:
        """Decide nothing any more; a transaction that is open counts as closed without a commit."""
        if _tied.pop(self._watching, None) is not None:
            for name, hook in self._hooks.items():
                event.remove(self._watching, name, hook)
            if _session_class(self._factory) is self._watching:
                _use_session_class(self._factory, self._watching.__bases__[0])

    def __enter__(self) -> CommitTie:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _subclass(self, configured: type[Session]) -> type[Session]:
        """A class for the factory's sessions alone, which sees what no hook tells."""

        def watched(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(session: Session, *args: Any, **options: Any) -> Any:
                try:
                    return method(session, *args, **options)
                finally:
                    if not _selects(*args, **options):  # nor does who asks for the connection
                        self._wrote(session)

            return call

        def expunge_all(session: Session) -> None:  # the first thing that closing does
            if _dirty(session):
                self._wrote(session)
            configured.expunge_all(session)

        names = ("connection", "execute", "scalar", "scalars")
        members: dict[str, object] = {name: watched(getattr(configured, name)) for name in names}
        members["expunge_all"] = expunge_all
        return type(configured.__name__, (configured,), members)

    def _sections(self, session: Session) -> list[Section | None]:
        """Those of its transaction and of the savepoints in it, innermost last.

        None stands for one that no unit of work knows.
        """
        sections: list[Section | None] = session.info.setdefault(self, [])
        return sections

    def _innermost(self, session: Session) -> Section | None:
        return next(reversed(self._sections(session)), None)

    def _wrote(self, session: Session) -> None:
        if section := self._innermost(session):
            section.wrote = True

    def _began(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is not None and not transaction.nested:
            self._wrote(session)  # it is part of a flush, or of one of the bulk methods
            return
        if not transaction.nested:
            self._close(session)  # left where a connection was lost while it was being closed
        around, weakly = self._innermost(session), ref(session)
        section = None
        if around is not None or not transaction.nested:
            section = begin(self._state, lambda: _dirty(weakly()), around=around)
        self._sections(session).append(section)

    def _committing(self, session: Session) -> None:
        if (section := self._innermost(session)) and len(self._sections(session)) == 1:
            section.in_doubt = True

    def _committed(self, session: Session) -> None:
        if section := self._innermost(session):
            section.commit()

    def _rolled_back(self, session: Session) -> None:
        if section := self._innermost(session):
            # What is prepared can be rolled back for sure, and changes are left where the flush
            # that goes before a commit has failed; else it may be the commit itself that failed.
            if session.twophase or _dirty(session):
                section.in_doubt = False
            section.rollback()

    def _ended(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.nested or transaction.parent is None:
            self._close(session, innermost_only=transaction.nested)

    def _close(self, session: Session, *, innermost_only: bool = False) -> None:
        sections = self._sections(session)
        for _ in sections[-1:] if innermost_only else sections[:]:
            if section := sections.pop():
                section.close()


def _dirty(session: Session | None) -> bool:
    """Whether it has changes that are still to be flushed."""
    return session is not None and bool(session.new or session.dirty or session.deleted)


def _selects(statement: object = None, *_: object, **__: object) -> bool:
    """Whether that is all that a call with these arguments does."""
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
