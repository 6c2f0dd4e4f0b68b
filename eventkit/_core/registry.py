"""Owns the subscriptions of one bus: the look-up by event type, and its cache.

Knows nothing of how handlers run.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from weakref import WeakSet, WeakValueDictionary

from eventkit._core.blocking import timed
from eventkit._core.dependencies import Resolver, with_dependencies
from eventkit._core.handlers import Handler
from eventkit._core.locations import importing
from eventkit._core.locks import new_lock
from eventkit._core.names import Names, Reruns
from eventkit._core.subscriptions import (
    Declaration,
    Plan,
    Subscription,
    in_order,
    is_event_type,
    not_an_event,
    order_of_first,
    refuse_non_event,
)


class Registry:
    """All subscriptions of one bus.

    Thread-safe: changes take the lock and drop the cache; a look-up in the cache takes no lock.

    Args:
        resolver: Compiles the dependencies of handlers; None for the default resolver.
        make_default: Makes the default resolver, once a handler has dependencies.
        unhandled: Called with each event type without a handler, at its first publish.
        timed: Whether the steps of handlers are timed, to find those that block the event loop.
    """

    __slots__ = (
        "__weakref__",
        "_by_type",
        "_changes",
        "_lasting",
        "_lock",
        "_make_default",
        "_names",
        "_plans",
        "_reruns",
        "_resolver",
        "_subscribed",
        "_tell_unhandled",
        "_timed",
        "_unhandled",
    )

    def __init__(
        self,
        resolver: Resolver | None,
        make_default: Callable[[], Resolver],
        unhandled: Callable[[type], None],
        *,
        timed: bool,
    ) -> None:
        self._resolver = resolver
        self._make_default = make_default
        self._tell_unhandled = unhandled
        self._timed = timed
        self._lock = new_lock()
        self._by_type: dict[type, dict[object, Subscription]] = {}
        self._names = Names()
        self._changes = 0
        self._reruns = Reruns()
        self._plans: dict[type, Plan] = {}
        self._unhandled: WeakSet[type] = WeakSet()  # event types that were logged as unhandled
        self._subscribed: WeakSet[type] = WeakSet()  # types that had a handler, but are no events
        self._lasting: list[Subscription] = []  # made by an import since the last `keep`
        _registries[id(self)] = self

    def add(self, declarations: Sequence[Declaration]) -> list[Subscription]:
        """Subscribe all declarations, or raise and subscribe none.

        Raises:
            DuplicateSubscriptionError: A handler is subscribed already.
            InvalidHandlerError: A handler has a parameter that nothing provides.
            DuplicateNameError: Two handlers have the same name.
        """
        targets = [
            with_dependencies(d.declared, self._resolver, self._make_default) for d in declarations
        ]
        with self._lock:
            added: dict[type, dict[object, Subscription]] = {}
            self._names.refuse_clashes(declarations)
            for declaration, target in zip(declarations, targets, strict=True):
                event_type, identity = declaration.event_type, target.identity
                declaration.refuse_twin(self._by_type.get(event_type, {}).get(identity))
                declaration.refuse_twin(added.get(event_type, {}).get(identity), named_twice=True)
                to_run = timed(target) if self._timed else target
                subscription = Subscription(declaration, to_run, self.remove)
                added.setdefault(event_type, {})[identity] = subscription
            replaced = self._replace(s for group in added.values() for s in group.values())
            for event_type, subscriptions in added.items():
                self._by_type.setdefault(event_type, {}).update(subscriptions)
                if not is_event_type(event_type):
                    self._subscribed.add(event_type)
            self._names.add(declarations)
            self._changed()
            made = in_order(s for group in added.values() for s in group.values())
            if importing():
                self._lasting += made
        for earlier, later in replaced:
            self._reruns.warn(earlier, later)
        return made

    def _replace(
        self, subscriptions: Iterable[Subscription]
    ) -> list[tuple[Subscription, Subscription]]:
        """Replace earlier subscriptions whose file was executed again. Needs the lock.

        The later one handles the events that wait for the earlier one.
        """
        replaced: list[tuple[Subscription, Subscription]] = []
        for later in subscriptions:
            group = self._by_type.get(later.event_type, {})
            earlier = self._reruns.earlier(later, group.values())
            if earlier is not None:
                self.remove(earlier)
                earlier.successor = later
                later.order = earlier.order
                replaced.append((earlier, later))
        return replaced

    def remove(self, subscription: Subscription) -> None:
        """End a subscription. Calling it again has no effect."""
        with self._lock:
            if subscription.active:
                subscription.active = False
                subscriptions = self._by_type[subscription.event_type]
                del subscriptions[subscription.declared.identity]
                if not subscriptions:
                    del self._by_type[subscription.event_type]
                self._names.remove(subscription)
                self._changed()

    def retarget(self, subscription: Subscription, target: Handler) -> None:
        """Run another handler instead of the declared one, also for events that wait."""
        with self._lock:
            subscription.target = target
            self._changed()

    def _changed(self) -> None:
        """Note a change of the subscriptions. Needs the lock."""
        self._changes += 1
        self._forget_plans()

    def _forget_plans(self) -> None:
        """Empty the cache, and mark its plans as out of date. Needs the lock.

        The lock does not stop a finalizer that publishes during this method. The plans that it
        looks up go into the new cache.
        """
        plans, self._plans = self._plans, {}
        for plan in plans.values():
            plan.valid = False

    def let_types_go(self) -> None:
        """Empty the cache, so that it keeps no type alive. The next publishes fill it again.

        The garbage collector calls it, in any thread and at any moment. If another thread has the
        lock, the types stay until the next call.
        """
        if self._lock.acquire(blocking=False):
            try:
                self._forget_plans()
            finally:
                self._lock.release()

    def keep(self) -> Callable[[], None]:
        """Remember the current subscriptions; the function that is returned restores them.

        It cancels later subscriptions, and subscribes again those that were cancelled since. A
        subscription that a module has made during its import stays, because the module will not be
        imported again.
        """
        with self._lock:
            then = [each for group in self._by_type.values() for each in group.values()]
            changes = self._changes
            subscribed = {*self._subscribed}
            self._lasting = []

        def restore() -> None:
            with self._lock:
                if self._changes == changes:
                    return
                for subscription in self:
                    subscription.active = False
                self._by_type, self._names = {}, Names()
                self._subscribed = WeakSet(subscribed)
                stay = {*then, *self._lasting}
                for subscription in in_order(stay):
                    if subscription.latest is not subscription and subscription.latest in stay:
                        continue  # its module was imported again
                    subscription.successor = None
                    group = self._by_type.setdefault(subscription.event_type, {})
                    group[subscription.declared.identity] = subscription
                    subscription.active = True
                    self._names.add([subscription])
                self._changed()

        return restore

    def plan_for(self, event: object) -> Plan:
        """The subscriptions that an event reaches, in start order.

        Raises:
            InvalidEventTypeError: It is a class, or it is not an event and has no handler.
        """
        plan = self._plans.get(type(event))
        return self._look_up(event) if plan is None else plan

    def _look_up(self, event: object) -> Plan:
        """As `plan_for`, for a type that is not in the cache."""
        refuse_non_event(event)
        event_type = type(event)
        with self._lock:
            plans = self._plans
            plan = self.resolve(event_type)
            if not plan and not self._is_known(event_type):
                raise not_an_event(event)
            plans[event_type] = plan
            if self._plans is not plans:  # a finalizer has changed a subscription meanwhile
                plan.valid = False
            is_news = not plan and event_type not in self._unhandled
            if is_news:
                self._unhandled.add(event_type)
        if is_news:
            self._tell_unhandled(event_type)
        return plan

    def _is_known(self, event_type: type) -> bool:
        """Whether it may be a class of events, or has had its own handler before.

        `publish` must not raise for a `str` only because the last stream of `str` has been closed.
        """
        return is_event_type(event_type) or any(
            base in self._subscribed for base in event_type.__mro__ if base is not object
        )

    def resolve(self, event_type: type) -> Plan:
        """The subscriptions for an event of exactly this type, in start order.

        It changes nothing, and neither refuses nor logs: `plan_for` does.
        """
        groups: dict[object, list[Subscription]] = {}
        with self._lock:
            for base in event_type.__mro__:
                for identity, subscription in [*self._by_type.get(base, {}).items()]:
                    groups.setdefault(identity, []).append(subscription)
            return Plan.of(sorted(map(in_order, groups.values()), key=order_of_first))

    def __iter__(self) -> Iterator[Subscription]:
        with self._lock:
            subscriptions = in_order(s for group in self._by_type.values() for s in group.values())
        return iter(subscriptions)


# All registries of the process, by their id, as long as their buses live.
_registries: WeakValueDictionary[int, Registry] = WeakValueDictionary()

_partial_collections = count(1)

_PARTIAL_COLLECTIONS = 1000


def _before_collecting(phase: str, info: Mapping[str, int]) -> None:
    """Empty all caches, so that they do not keep classes alive that nothing else uses.

    A class is part of reference cycles, so only the garbage collector frees it. With weak keys in
    the cache, each look-up would cost twice as much. Full collections are rare, and cost more than
    filling the caches again. Python 3.14 and builds without the GIL start no full collections by
    themselves, so one in 1000 partial collections empties the caches, too.
    """
    if phase == "start" and (
        info["generation"] == 2 or next(_partial_collections) % _PARTIAL_COLLECTIONS == 0
    ):
        alive = [each() for each in _registries.valuerefs()]
        for registry in filter(None, alive):
            registry.let_types_go()


gc.callbacks.append(_before_collecting)

atexit.register(gc.callbacks.remove, _before_collecting)  # at exit, Python clears this module
