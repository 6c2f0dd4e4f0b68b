"""What holds whatever a program does."""

# Programs are JSON, whose values have no types.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections import Counter, defaultdict, deque
from itertools import pairwise

from tests.fuzz.play import KINDS, Event, Play, Record
from tests.fuzz.programs import Program


def may_cut_dispatches(program: Program, ops: set[str]) -> bool:
    """Whether a dispatch inside a handler may be cancelled by what is around it there."""
    inside = {"deadline", "scope", "native", "group"} & ops
    return "dispatch" in ops and bool(may_be_late(program) or inside)


def may_be_late(program: Program) -> bool:
    """Whether a handler may be past its time."""
    return bool(program["limit"]) or any(
        handler["timeout"] not in ("bus", None) for each in program["handlers"] for handler in each
    )


def judge(play: Play) -> None:
    records = play.records[: play.judged]
    program, wrong, stats = play.program, play.wrong, play.stats
    ends = Counter(record.end for record in records)
    actions = {action for action, _, _ in play.done}
    fatal = bool(ends["fatal"])
    spoiled = "leave open" in play.ops
    disturbed = bool(
        actions
        or program["around"]
        or program["close"] is not None
        or fatal
        or spoiled
        or program["closes"] is not None
    )
    threads = "thread" in play.ops or "in thread" in play.ops

    inside = may_cut_dispatches(program, play.ops)

    # Each delivery begins once, and those of an event in the order of their handlers.
    begun = Counter(record.key for record in records)
    if begun and max(begun.values()) > 1:
        wrong("a delivery began twice")
    by_event: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_event[record.event.uid].append(record)
    for siblings in by_event.values():
        indexes = [record.index for record in siblings]
        if indexes != sorted(indexes) and not threads:
            wrong(f"begun in the order {indexes}")
        at_once = play.loop != "uvloop" and not threads and not program["sequential"]
        # AnyIO cancels the whole group then, in which a shielded handler goes on.
        at_once = at_once and "worker before its first step" not in actions
        if at_once and len({record.time for record in siblings}) > 1:
            wrong("siblings began one after the other")
        if program["sequential"] and not (threads and disturbed):
            for one, other in pairwise(siblings):
                if one.ended > other.begun or not one.ended:
                    wrong("sequential handlers overlap")

    # All ends.
    for record in records:
        if record.end is None:
            wrong(f"{record.key} has not ended")
    if not (threads and disturbed) and not spoiled and ends["returned"] != stats.handled:
        wrong(f"handled {stats.handled}, but {ends['returned']} returned")
    if play.reported != stats.failed:
        wrong(f"failed {stats.failed}, but {play.reported} reported")
    # A cancellation from elsewhere is no failure of the handler that it ends. But AnyIO may take
    # back a `Task.cancel()` of a task group's task, in the place of a request that a scope in a
    # child of the group has made. Then nothing tells that cancellation from one that is made up.
    natively = actions & {"native", "worker", "self"} or (program["around"] or [""])[0] == "native"
    taken_back = natively and {"group", "dispatch"} & play.ops
    blamed = may_be_late(program) or {"raise cancelled", "raise mixed"} & play.ops or taken_back
    if not (blamed or threads or spoiled) and ends["failed"] != stats.failed:
        wrong(f"failed {stats.failed}, but {ends['failed']} raised something")
    if not disturbed and not inside and stats.undelivered:
        wrong(f"undelivered {stats.undelivered} for no reason")
    if not disturbed:
        for siblings in by_event.values():
            if inside and siblings[0].event.unit not in play.units:
                continue
            due = len(program["handlers"][KINDS.index(type(siblings[0].event))])
            if len(siblings) != due:
                wrong("handlers that never began")

    # Events follow each other in order, the next when all handlers of the last have ended.
    for unit, staged in play.staged.items():
        cut = disturbed or (inside and unit not in play.units)
        _judge_order(play, unit, staged, by_event, cut)

    # Observers.
    if program["observed"]:
        for key, told in play.watcher.told.items():
            if key.startswith("probe"):
                continue
            expected = [
                ["published", "begun", "handled"],
                ["published", "begun", "failed"],
                ["published", "begun", "ended", "undelivered"],
                ["published", "undelivered"],
                ["published", "discarded"],
            ]
            if told not in expected and not (threads and sorted(told) in map(sorted, expected)):
                wrong(f"an observer was told {told}")

    # Whoever waits is told.
    results = play.results
    if program["way"] != "background":
        top = [r for r in records if r.event.unit in play.units]
        replaced = "cancelled" in results and program["way"] != "dispatch"
        if any(record.end == "fatal" for record in top) and "fatal" not in results and not replaced:
            wrong(f"a fatal error was lost: {results}")
        if "fatal" in results and not fatal:
            wrong("fatal for no reason")
        only_callers = actions <= {"scope", "native"} and not spoiled
        lost = sum(result[1] for result in results if isinstance(result, tuple))
        if only_callers and lost and not inside:
            wrong(f"returned as if nothing had happened, and lost {lost}")
        loses = {"group", "dispatch", "native"} & play.ops or program["around"] or threads
        if play.natives and not play.told and not loses and "fatal" not in results:
            wrong(f"the caller was never told of its cancellation: {results}")
        if "cancelled" in results and not actions and not program["around"]:
            wrong("cancelled for no reason")
    # A cancellation of one task costs the delivery in it, behind the response even less.
    calls = len([1 for action, _, _ in play.done if action in ("worker", "self")])
    lonely = not (fatal or spoiled or program["around"] or {"dispatch", "swallow"} & play.ops)
    if program["way"] == "background":
        only_tasks = actions <= {"worker", "self"} and program["close"] is None
        if only_tasks and lonely and stats.undelivered > min(calls, ends["cancelled"] + threads):
            wrong(f"{calls} native cancellations of workers cost {stats.undelivered}")
    elif actions == {"worker"} and lonely and stats.undelivered > calls:
        wrong(f"{calls} native cancellations of helpers cost {stats.undelivered}")

    # Nothing begins after a cancellation.
    ending = [at for action, soon, at in play.done if action in ("scope", "owner") and soon]
    if ending and program["way"] != "drain" and not program["beside"]:
        end = max(ending) if "owner" in actions else min(ending)
        late = [r for r in records if r.event.unit in play.units and r.begun > end]
        if late and not threads:
            wrong(f"{late[0].key} began after the cancellation")

    # Units behind the response.
    if program["way"] == "background" and not spoiled and not program["beside"]:
        marks = sorted(
            [(r.begun, 1, r.event.unit) for r in records]
            + [(r.ended, -1, r.event.unit) for r in records]
        )
        running = Counter[str]()
        for _, change, unit in marks:
            running[unit] += change
            units = sum(1 for key, times in running.items() if times and key in play.units)
            if units > program["concurrency"]:
                wrong(f"{units} units at once")
        first: dict[str, int] = {}
        for record in records:
            if record.event.unit in play.units:
                first.setdefault(record.event.unit, record.begun)
        begun_units = [unit for unit in play.units if unit in first]
        order = sorted(begun_units, key=lambda unit: first[unit])
        if order != begun_units and program["concurrency"] == 1 and not threads:
            wrong(f"units began in the order {order}")


def _judge_order(
    play: Play,
    unit: str,
    staged: list[tuple[int, list[Event]]],
    by_event: dict[str, list[Record]],
    disturbed: bool,
) -> None:
    def has_handlers(event: Event) -> bool:
        return bool(play.program["handlers"][KINDS.index(type(event))])

    turns = sorted(
        (siblings for siblings in by_event.values() if siblings[0].event.unit == unit),
        key=lambda siblings: siblings[0].begun,
    )
    for one, other in pairwise(turns):
        overlap = max(record.ended for record in one) > min(record.begun for record in other)
        if overlap and not {"leave open", "thread"} & play.ops:
            play.wrong("handlers of two events of a unit overlap")
    waiting: deque[Event] = deque()
    phases = deque(staged)
    for siblings in turns:
        while phases and phases[0][0] < siblings[0].begun:
            waiting.extend(event for event in phases.popleft()[1] if has_handlers(event))
        event = siblings[0].event
        if event not in waiting:
            play.wrong(f"{event.uid} was delivered, and should not have been")
            return
        while (following := waiting.popleft()) is not event:
            if not disturbed:
                play.wrong(f"{event.uid} came before {following.uid}")
                return
        for record in sorted(siblings, key=lambda record: record.index):
            for follow_up, decided in record.published:
                if (record.end == "returned" or decided) and has_handlers(follow_up):
                    waiting.append(follow_up)
    while phases:
        waiting.extend(event for event in phases.popleft()[1] if has_handlers(event))
    if waiting and not disturbed:
        play.wrong(f"never delivered: {[event.uid for event in waiting]}")
