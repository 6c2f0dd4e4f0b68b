"""Owns locks that are free in a forked child process. Knows nothing of what they guard."""

from __future__ import annotations

import os
import threading
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

# All locks of the process, by their id, as long as their owners live. Any: a fork needs private
# methods of a lock, as `threading` and `logging` do, and type checkers do not know them.
_locks: WeakValueDictionary[int, Any] = WeakValueDictionary()
_PATIENCE = 1.0  # seconds that a fork waits for a lock; threads hold one only for a moment


def new_lock() -> RLock:
    """Make a lock that is free in a forked child process, even if another thread held it.

    In the child only the thread that forked exists. A lock of another thread would stay locked. So
    a fork waits for each lock, for at most one second. If the fork gets the lock, the data that the
    lock guards is consistent in the child.

    A thread may take the lock twice, because finalizers and signal handlers run at any line.
    """
    lock = RLock()
    _locks[id(lock)] = lock
    return lock


class _Forking(threading.local):
    """The locks that a thread has taken for its fork, and whether it had each lock before."""

    def __init__(self) -> None:
        self.taken: list[tuple[Any, bool]] = []


_forking = _Forking()


def _living_locks() -> list[Any]:
    return [lock for alive in _locks.valuerefs() if (lock := alive()) is not None]


def _before_fork() -> None:
    for lock in _living_locks():
        had_before = lock._is_owned()  # noqa: SLF001 - as `threading` does
        if lock.acquire(timeout=_PATIENCE):
            _forking.taken.append((lock, had_before))


def _after_fork_in_parent() -> None:
    while _forking.taken:
        lock, _ = _forking.taken.pop()
        lock.release()


def _after_fork_in_child() -> None:
    """Free all locks, except those that the thread had before: it still has to release them."""
    had_before = {id(lock) for lock, had_before in _forking.taken if had_before}
    _forking.taken.clear()
    for lock in _living_locks():
        if id(lock) in had_before:
            lock.release()
        else:
            lock._at_fork_reinit()  # noqa: SLF001 - as `threading` and `logging` do


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has none
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
