"""SQLAlchemy: an event is delivered if and only if its transaction is committed.

    deliver_on_commit(bus, engine)

This module watches the transactions of an engine. It knows nothing of HTTP. The rules are in
`eventkit._core.transactions`. SQLAlchemy calls its hooks synchronously, in the thread that uses the
session or connection. The hooks here only set marks: no handler runs in a hook.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any, TypeGuard
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

from eventkit.exceptions import not_installed

try:
    from sqlalchemy import Connection, Engine, event, select
    from sqlalchemy.ext.asyncio import (
        AsyncEngine,
        async_scoped_session,
        async_session,
        async_sessionmaker,
    )
except ImportError as _missing:  # without greenlet, SQLAlchemy raises one without a `name`
    raise not_installed(__name__, _missing.name or "greenlet", "sqlalchemy") from _missing
from sqlalchemy.engine import ExceptionContext, RootTransaction
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, SessionTransaction, scoped_session, sessionmaker

from eventkit._core.bus import EventBus, state_of
from eventkit._core.state import BusState
from eventkit._core.statements import Step, effect_of
from eventkit._core.transactions import Decisions, End, Transaction

__all__ = ["CommitTie", "deliver_on_commit"]

# Any: a factory is invariant in the class of its sessions, and the class does not matter here.
_Factory = sessionmaker[Any] | async_sessionmaker[Any]
_Sessions = _Factory | scoped_session[Any] | async_scoped_session[Any]

_COMMIT_FAILED = "a commit failed, and may have happened all the same"
_ANSWERED_ROLLBACK = "a statement had failed, so the database answered COMMIT with ROLLBACK"
_OF_THE_DRIVER = "?"  # stands for a statement that is not a text; it may write
_DEADLOCK = 1213  # error code of MySQL and MariaDB

_gone: Callable[[], None] = type(None)  # like a weak reference whose object is gone
_ties: list[CommitTie] = []  # those that are not detached


def deliver_on_commit(bus: EventBus, engine: Engine | AsyncEngine | _Sessions) -> CommitTie:
    """Let the transactions of an engine decide which events are delivered.

        deliver_on_commit(bus, engine)  # once, where you set up the application

    An event is delivered if and only if the transaction in which it was published is committed. If
    it was published outside of all transactions, the next commit in its unit of work releases it,
    or the outcome of the request decides. A savepoint that is rolled back discards the events that
    were published in it. The delivery itself happens when the unit of work ends.
    `even_on_failure=True`, `release()` and `drain()` take precedence over all of this.

    All sessions and Core connections of the engine count. A transaction that has not written
    decides nothing. The page "Transactions" has the rules and the rare cases:
    https://fastapi-eventkit.readthedocs.io/commits/.

    Args:
        bus: The bus. For several buses, call this function once for each bus.
        engine: An `Engine`, an `AsyncEngine`, a `sessionmaker`, an `async_sessionmaker`, or a
            scoped session. A session factory stands for all engines that it is bound to, and for
            engines that its sessions are bound to later.

    Returns:
        A handle with a method `detach()`. Used as a context manager, it ends with the block.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `deliver_on_commit` was called before for this bus and this engine.
    """
    if not isinstance(bus, EventBus):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"deliver_on_commit() takes an EventBus first, not {bus!r}")
    factory = engine
    if isinstance(factory, scoped_session | async_scoped_session):
        factory = factory.session_factory
    if isinstance(factory, Engine | AsyncEngine):
        return CommitTie(bus, [root_of(factory)], None)
    if isinstance(factory, sessionmaker | async_sessionmaker):  # pyright: ignore[reportUnnecessaryIsInstance]
        return CommitTie(bus, _engines_of(factory), factory)
    shown = "a str" if isinstance(engine, str) else repr(engine)  # a URL may have a password
    raise TypeError(
        "deliver_on_commit() takes an Engine or AsyncEngine, or a sessionmaker or "
        f"async_sessionmaker that has one, not {shown}: pass the engine itself"
    )


class CommitTie:
    """The handle that `deliver_on_commit` returns: `detach()` ends it. Also a context manager.

        with deliver_on_commit(bus, engine):    # detached at the end of the block
            ...

    Attributes:
        detached: Whether it has ended.
        before_commit: Called right before the driver's COMMIT, with the user's connection and the
            transaction. The events that the commit releases are `transaction.decides()`. If one
            raises, the user's `commit()` raises it, and nothing is committed.
        ended: Called with the transaction and its `End`, once that is known.
    """

    def __init__(self, bus: EventBus, engines: list[Engine], factory: _Factory | None) -> None:
        for tie in [*_ties]:
            if (other := tie._bus()) is None:  # noqa: SLF001 - an instance of this class
                tie.detach()
            elif other is bus and (shared := [each for each in engines if each in tie._engines]):  # noqa: SLF001
                raise ValueError(
                    f"{bus!r} is tied to {shared[0]!r} already: all sessions and connections of "
                    "an engine count, so call deliver_on_commit() once, where you set up the "
                    "application"
                )
        self.detached: bool = False
        self.before_commit: list[Callable[[Connection, Transaction], object]] = []
        self.ended: list[Callable[[Transaction, End], object]] = []
        self._bus: ReferenceType[EventBus] = ref(bus)
        self._factory = factory
        self._engines: WeakSet[Engine] = WeakSet()
        self._sessions: WeakKeyDictionary[Session, _Watched] = WeakKeyDictionary()
        # By SQLAlchemy's transaction of a connection: that of its session, or the connection's own.
        self._transactions: WeakKeyDictionary[RootTransaction, _Watched] = WeakKeyDictionary()
        # By the caller's connection: the session that is about to begin a savepoint on it.
        self._expected: WeakKeyDictionary[Connection, _Watched] = WeakKeyDictionary()
        self._engine_hooks: dict[str, Callable[..., None]] = {
            "before_cursor_execute": self._execute,
            "commit": self._commit,
            "commit_twophase": self._commit,
            "prepare_twophase": self._prepare,
            "rollback": self._roll_back,
            "rollback_twophase": self._roll_back,
            "handle_error": self._fail,
        }
        self._session_hooks: dict[str, Callable[..., None]] = {
            "after_transaction_create": self._session_began,
            "after_begin": self._session_connected,
            "after_commit": self._session_committed,
            "after_rollback": self._session_rolled_back,
            "after_transaction_end": self._session_ended,
            "pending_to_transient": self._object_left,
        }
        for name, hook in self._session_hooks.items():
            event.listen(Session, name, hook)
        for engine in engines:
            self._watch(engine)
        _ties.append(self)
        state_of(bus).decisions = Decisions()

    def detach(self) -> None:
        """Stop watching transactions. An open transaction that has written counts as lost."""
        if not self.detached:
            self.detached = True
            _ties.remove(self)
            for name, hook in self._session_hooks.items():
                event.remove(Session, name, hook)
            for engine in self._engines:
                for name, hook in self._engine_hooks.items():
                    event.remove(engine, name, hook)
            self._transactions.clear()

    def __enter__(self) -> CommitTie:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def transaction_of(self, session: Session) -> Transaction | None:
        """The watched transaction of the session; None if there is none."""
        return self._sessions.get(session)

    def _watch(self, engine: Engine) -> None:
        for name, hook in self._engine_hooks.items():
            event.listen(engine, name, hook)  # SQLAlchemy adds a listener only once
        self._engines.add(engine)  # last: other threads rely on the listeners from now on

    @property
    def _state(self) -> BusState | None:
        bus = self._bus()
        return None if bus is None else state_of(bus)

    # What happens on the engine's connections

    def _execute(
        self,
        connection: Connection,
        cursor: object,
        statement: object,  # usually a text
        parameters: object,
        context: object,
        executemany: bool,
    ) -> None:
        transaction = self._of(connection)
        effect = effect_of(statement if isinstance(statement, str) else _OF_THE_DRIVER)
        if effect.steps and (expected := self._expected.pop(connection, None)) is not None:
            expected.savepoint = effect.steps[0][1]
        elif transaction is not None:
            transaction.use()
            transaction.had_written = transaction.levels[0].wrote
            if effect.writes:
                transaction.write()
                if _commits_itself(connection):
                    transaction.confirm()
                    transaction.sent = True
            for step, name in effect.steps:
                if step is Step.UNDO and (outermost := self._outermost(connection)) is not None:
                    outermost.failed = False
                elif step is Step.KEEP and name == transaction.savepoint:
                    self._before_commit(connection, transaction)
                transaction.take_step(step, name)

    def _of(self, connection: Connection) -> _Watched | None:
        """The innermost watched transaction of the connection; created if there is none yet."""
        root = connection.get_transaction()
        if root is None:  # this statement begins the transaction
            return None
        transaction = self._transactions.get(root)
        if transaction is None and (state := self._state) is not None:
            transaction = self._transactions[root] = _Watched(self, state)
            transaction.root = ref(root)
        return transaction

    def _outermost(self, connection: Connection | None) -> _Watched | None:
        """The transaction that the connection's own COMMIT and ROLLBACK end."""
        root = None if connection is None else connection.get_transaction()
        transaction = None if root is None else self._transactions.get(root)
        while transaction is not None and transaction.covers is not None:
            transaction = transaction.covers
        return transaction

    def _commit(self, connection: Connection, *_: object) -> None:
        transaction = self._outermost(connection)
        if transaction is not None:
            if not transaction.prepared:
                try:
                    self._before_commit(connection, transaction)
                except BaseException:
                    _undo(connection)
                    all_of_it = [tie._outermost(connection) for tie in [*_ties]]  # noqa: SLF001
                    for each in filter(None, all_of_it):  # SQLAlchemy calls no other bus's hook now
                        each.roll_back("the commit was refused")
                    raise
            transaction.committing, transaction.committed_by = True, get_ident()

    def _prepare(self, connection: Connection, *_: object) -> None:
        if (transaction := self._outermost(connection)) is not None:
            self._before_commit(connection, transaction)
            transaction.prepared = True

    def _before_commit(self, connection: Connection, transaction: _Watched) -> None:
        if transaction.failed and _is_doomed(connection):
            transaction.doomed = True
            return
        for hook in self.before_commit:
            hook(connection, transaction)

    def _roll_back(self, connection: Connection, *_: object) -> None:
        transaction = self._outermost(connection)
        if transaction is not None and not transaction.of_session:
            transaction.look_around()
            transaction.confirm()
            transaction.roll_back("the transaction was rolled back")

    def _fail(self, context: ExceptionContext) -> None:
        transaction = self._outermost(context.connection)
        if transaction is None:
            return
        if transaction.committing and context.statement is None:  # else a hook's own statement
            transaction.look_around()
            refused = isinstance(
                context.sqlalchemy_exception or context.original_exception, DBAPIError
            )
            in_doubt = context.is_disconnect or not refused
            transaction.roll_back("the commit failed", _COMMIT_FAILED if in_doubt else None)
            return
        transaction.failed, transaction.sent = True, False
        if (
            transaction.had_written
            and context.connection is not None
            and _was_undone(context.connection, context.original_exception)
        ):
            transaction.failed = False
            transaction.start_over("the database has undone the transaction")

    # What happens in sessions

    def _session_began(self, session: Session, begun: SessionTransaction) -> None:
        if begun.nested:
            if (transaction := self._sessions.get(session)) is not None:
                transaction.begin_savepoint()
        elif begun.parent is None:  # else it is part of a flush
            if (before := self._sessions.get(session)) is not None:
                before.leave()  # the connection was lost while the transaction was being closed
            bind = session.bind
            if bind is not None and self._counts(session, bind.engine):
                transaction = self._begin(session)
                if transaction is not None and _begins_savepoint(bind, session):
                    self._expected[bind] = transaction

    def _begin(self, session: Session) -> _Watched | None:
        if (state := self._state) is None:
            return None
        transaction = self._sessions[session] = _Watched(self, state, session)
        transaction.use()
        return transaction

    def _counts(self, session: Session, engine: Engine) -> bool:
        """Whether the engine is watched; starts it if the session comes from the factory."""
        engine = root_of(engine)
        if engine in self._engines:
            return True
        if self._factory is None or not _made(self._factory, session):
            return False
        if any(tie._bus() is self._bus() and engine in tie._engines for tie in _ties):  # noqa: SLF001
            return False  # another tie watches it
        self._watch(engine)
        return True

    def _session_connected(
        self, session: Session, begun: SessionTransaction, connection: Connection
    ) -> None:
        root, transaction = connection.get_transaction(), self._sessions.get(session)
        if transaction is None and self._counts(session, connection.engine):
            transaction = self._begin(session)
        if root is None or transaction is None:
            return
        if begun.nested:
            transaction.forget_savepoint()  # it was seen on the connection, and is the session's
            return
        if session.bind is connection:
            transaction.covers = below = self._of(connection)
            if below is not None and transaction.savepoint is None:
                transaction.be_part_of(below)
        transaction.root = ref(root)
        self._transactions[root] = transaction

    def _session_committed(self, session: Session) -> None:
        if (transaction := self._sessions.get(session)) is not None:
            transaction.commit_session()

    def _session_rolled_back(self, session: Session) -> None:
        if (transaction := self._sessions.get(session)) is not None:
            transaction.roll_back_session()

    def _session_ended(self, session: Session, ended: SessionTransaction) -> None:
        if ended.parent is not None and not ended.nested:  # it is part of a flush
            return
        transaction = self._sessions.get(session)
        if transaction is None:
            return
        if ended.nested:
            transaction.leave_savepoint()
            return
        del self._sessions[session]
        if transaction.covers is not None and (root := transaction.root()) is not None:
            self._transactions[root] = transaction.covers
        transaction.leave_session()

    def _object_left(self, session: Session, _: object) -> None:
        """An object was added and never flushed."""
        if (transaction := self._sessions.get(session)) is not None:
            transaction.write()


class _Watched(Transaction):
    """A transaction of a session, or of a connection without a session.

    Attributes:
        of_session: Whether it is the transaction of a session.
        root: Returns SQLAlchemy's transaction of the connection.
        covers: The transaction of the caller's connection, if the session has joined it.
        sent: A statement that writes was sent in AUTOCOMMIT, and its result is not known yet.
        committing: COMMIT was sent.
        committed_by: The thread that has sent COMMIT.
        prepared: PREPARE of a two-phase commit was sent.
        failed: A statement has failed, so the database may refuse all others.
        doomed: The database will answer COMMIT with ROLLBACK.
        had_written: Whether it had written before the last statement.
        savepoint: Name of its savepoint on the caller's connection, if it is only a savepoint.
    """

    __slots__ = (
        "_session",
        "_tie",
        "committed_by",
        "committing",
        "covers",
        "doomed",
        "failed",
        "had_written",
        "of_session",
        "prepared",
        "root",
        "savepoint",
        "sent",
    )

    def __init__(self, tie: CommitTie, state: BusState, session: Session | None = None) -> None:
        super().__init__(state)
        self._tie = tie
        self._session: Callable[[], Session | None] = _gone if session is None else ref(session)
        self.root: Callable[[], RootTransaction | None] = _gone
        self.of_session = session is not None
        self.covers: _Watched | None = None
        self.sent = False
        self.committing = False
        self.committed_by = 0
        self.prepared = False
        self.failed = False
        self.doomed = False
        self.had_written = False
        self.savepoint: str | None = None

    @property
    def is_root(self) -> bool:
        """Whether its commit is a COMMIT of the database, and not a RELEASE of a savepoint."""
        return self.savepoint is None

    def look(self) -> None:
        """Find out whether it has ended, and whether its session has objects to flush."""
        self.confirm()
        if self.of_session:
            if not self.levels[-1].has_written:
                if self.is_over():
                    self.leave()
                elif self.has_unflushed():
                    self.write()
            return
        root = self.root()
        if root is None or not root.is_active:
            if not self.committing:
                if self._tie.detached and self.levels[0].wrote:
                    return  # its end was not observed
                self.roll_back("the transaction was rolled back")
            elif root is not None and root.connection.get_transaction() is root:
                if self.committed_by != get_ident():
                    return  # another thread is in the middle of this commit
                self.roll_back("the commit failed", _COMMIT_FAILED)  # still there, so it failed
            else:
                self._end_well()
            self.leave()

    def look_around(self) -> None:
        """Check connections without a session: no hook says when their transaction has ended."""
        for unit in [*self.units]:
            for other in [*unit.queue.transactions]:
                if other is not self and not other.of_session:
                    other.look()

    def end(
        self, how: End, reason: str | None = None, warning: str | None = None, *, at: int = 0
    ) -> None:
        """As in the base class; then call the `ended` hooks of the tie."""
        news = at == 0 and self.levels[0].end is None
        super().end(how, reason, warning, at=at)
        for hook in self._tie.ended if news else ():
            hook(self, how)

    def is_over(self) -> bool:
        """Whether it has ended, was garbage collected, or is no longer watched."""
        if self.gone or self._tie.detached:
            return True
        if self.of_session:
            return self._session() is None
        return (root := self.root()) is None or not root.is_active

    def has_unflushed(self) -> bool:
        """Whether its session has objects that are not written yet."""
        session = self._session()
        if session is None:
            return False
        try:
            return bool(
                session.new or session.deleted or any(map(session.is_modified, session.dirty))
            )
        except Exception:  # noqa: BLE001 - a user's type cannot be compared, or another thread has
            return True  # changed the session at this moment

    def be_part_of(self, below: _Watched) -> None:
        """Its session has joined the caller's transaction `below`, which decides from now on."""
        self.levels[0].around, below.inside = below.levels[-1], ref(self)
        if self.levels[-1].wrote:
            below.write()
        below.use()
        self.use()

    def take_step(self, step: Step, name: str) -> None:
        """A savepoint is begun, kept or undone by a statement."""
        if step is Step.BEGIN:
            self.begin_savepoint(name)
            return
        depth = len(self.levels) - 1
        while (found := self.levels[depth].name) != name:
            if found is None:  # a savepoint of the session or of the caller, or an unknown one
                if self.covers is not None:
                    self.covers.take_step(step, name)
                return
            depth -= 1
        how = End.KEPT if step is Step.KEEP else End.ROLLED_BACK
        self.end(how, "the savepoint was rolled back", at=depth)
        self.levels.pop()
        if step is Step.UNDO:  # after ROLLBACK TO, the savepoint still exists and is empty
            self.begin_savepoint(name)

    def forget_savepoint(self) -> None:
        """Forget a savepoint that a statement has begun: it is the session's, whose hooks count."""
        while self.levels[-1].name is not None:
            self.levels.pop()

    def confirm(self) -> None:
        """Count an AUTOCOMMIT statement as committed: a failure would be known by now."""
        if self.sent:
            self.sent = False
            self.commit()

    def commit_session(self) -> None:
        """Its session has committed, or kept its innermost savepoint."""
        self.look_around()
        depth = self._depth_of_session()
        if depth > 0 or self.levels[0].around is not None:
            self.end(End.KEPT, at=depth)
            if self.covers is not None:
                self.covers.look()
        else:
            self._end_well()

    def roll_back_session(self) -> None:
        """Its session has rolled back, or its innermost savepoint."""
        self.look_around()
        self.look()
        depth = self._depth_of_session()
        if depth > 0:
            self.levels[depth].wrote = True  # an explicit rollback to a savepoint always decides
        warning = _COMMIT_FAILED if self.committing and depth == 0 else None
        self.end(End.ROLLED_BACK, "the transaction was rolled back", warning, at=depth)

    def leave_savepoint(self) -> None:
        """Its session has left its innermost savepoint; if it has not ended, it was rolled back."""
        depth = self._depth_of_session()
        if depth > 0:
            self.end(End.ROLLED_BACK, "the savepoint was rolled back", at=depth)
        while len(self.levels) > max(depth, 1):
            self.keep_savepoint()

    def leave_session(self) -> None:
        """Its session has left the transaction."""
        self.look_around()
        self.confirm()
        if self.levels[0].around is not None:
            self.end(End.KEPT)
        elif self.committing:
            self.roll_back("the commit failed", _COMMIT_FAILED)
        self.leave()

    def _depth_of_session(self) -> int:
        """The depth of the innermost savepoint that the session has begun; 0 if there is none."""
        depth = len(self.levels) - 1
        while self.levels[depth].name is not None:
            depth -= 1
        return depth

    def _end_well(self) -> None:
        if self.doomed:
            self.roll_back("the database answered COMMIT with ROLLBACK", _ANSWERED_ROLLBACK)
        else:
            self.commit()


def root_of(bind: Any) -> Engine:  # Any: all that a session can be bound to
    """The original engine: engines made by `execution_options` share the events of it."""
    found: Any = bind.engine
    engine: Engine = getattr(found, "sync_engine", found)
    while isinstance(engine, OptionEngine):
        engine = engine._proxied  # noqa: SLF001 - there is no public attribute
    return engine


def _engines_of(factory: _Factory) -> list[Engine]:
    """The engines that the factory is bound to now."""
    binds: list[Any] = [factory.kw.get("bind"), *(factory.kw.get("binds") or {}).values()]
    return [*dict.fromkeys(root_of(bind) for bind in binds if bind is not None)]


def _made(factory: _Factory, session: Session) -> bool:
    """Whether the factory has made the session, or the `AsyncSession` around it."""
    return isinstance(session, factory.class_) or isinstance(async_session(session), factory.class_)


def _commits_itself(connection: Connection) -> bool:
    """Whether each statement on the connection commits itself, by SQLAlchemy's own option."""
    level = connection.get_execution_options().get("isolation_level")
    if level is None:  # the argument of `create_engine` has no public attribute
        level = connection.dialect._on_connect_isolation_level  # noqa: SLF001
    return str(level).upper() == "AUTOCOMMIT"


def _begins_savepoint(connection: Engine | Connection, session: Session) -> TypeGuard[Connection]:
    """Whether a session on its caller's connection will begin its own savepoint there."""
    if isinstance(connection, Engine):
        return False
    match session.join_transaction_mode:
        case "create_savepoint":
            return connection.in_transaction()
        case "conditional_savepoint":
            return connection.in_nested_transaction()
        case _:
            return False


def _is_doomed(connection: Connection) -> bool:
    """Whether the database refuses every statement, because one in this transaction has failed."""
    try:
        connection.execute(select(1))
    except DBAPIError as error:
        return not error.connection_invalidated
    return False


def _undo(connection: Connection) -> None:
    """Roll back a transaction that SQLAlchemy leaves open after a listener of `commit` has raised.

    SQLAlchemy treats this transaction as ended. The next user of the connection from the pool would
    commit it.
    """
    try:
        connection.connection.rollback()
    except Exception as error:  # noqa: BLE001 - the driver's; the listener's exception is raised
        connection.invalidate(error)


def _was_undone(connection: Connection, error: BaseException) -> bool:
    """Whether the database has rolled back the transaction by itself; the next one begins."""
    match connection.dialect.name:
        case "sqlite":  # `sqlite3` and `aiosqlite` have the attribute
            driver = connection.connection.driver_connection
            return not getattr(driver, "in_transaction", True)
        case "mysql" | "mariadb":
            return error.args[:1] == (_DEADLOCK,)
        case _:
            return False
