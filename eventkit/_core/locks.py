"""Owns the locks that are free in a forked child. Knows nothing of what they guard."""

from __future__ import annotations

import os
import threading
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

# All locks of the process, by their id, as long as their owners live. Any: a fork needs of them
# what `threading` and `logging` use for it, and type checkers do not know.
_locks: WeakValueDictionary[int, Any] = WeakValueDictionary()
_PATIENCE = 1.0  # seconds that a fork waits for a lock; nobody holds one for longer than a moment


def new_lock() -> RLock:
    """Make a lock that is free in a forked child, whatever other threads did with it.

    In a child only the thread that forked exists: a lock that another one held would stay locked.
    So a fork waits for each lock, for one second at most. Where the fork got the lock, what the
    lock guards is in order in the child.

    The lock may be taken twice by one thread, since finalizers and signal handlers run anywhere.
    """
    lock = RLock()
    _locks[id(lock)] = lock
    return lock


class _Forking(threading.local):
    """What a thread that forks has taken for it: each lock, and whether it had the lock before."""

    def __init__(self) -> None:
        self.taken: list[tuple[Any, bool]] = []


_forking = _Forking()


def _living_locks() -> list[Any]:
    return [lock for alive in _locks.valuerefs() if (lock := alive()) is not None]


def _before_fork() -> None:
    for lock in _living_locks():
        had_before = lock._is_owned()  # noqa: SLF001 - as `threading` asks
        if lock.acquire(timeout=_PATIENCE):
            _forking.taken.append((lock, had_before))


def _after_fork_in_parent() -> None:
    while _forking.taken:
        lock, _ = _forking.taken.pop()
        lock.release()


def _after_fork_in_child() -> None:
    """Free each lock, but for those that the thread had before: it still has to release them."""
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
