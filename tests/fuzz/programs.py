"""What a program is, and how a seed makes one."""

# Programs are JSON, whose values have no types.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any, cast

LOOPS = ("asyncio", "asyncio-eager", "uvloop", "trio")
TYPES = 4

# Any: a program is JSON, so that it can be printed, kept and made smaller.
Program = dict[str, Any]
Op = list[Any]


class Maker:
    """Makes programs from a seed."""

    def __init__(self, seed: int, loop: str) -> None:
        self.random = Random(seed)
        self.native = loop != "trio"
        self.flavour = self.random.choice(["plain", "plain", "cancelled", "cancelled", "wild"])
        self.background = self.random.random() < 0.4
        self.threads = self.random.random() < 0.15
        self.beside = self.random.random() < 0.15  # somebody else drains units, too

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def seconds(self, least: float = 0.1, most: float = 20) -> float:
        """Never the same twice, so that nothing is a matter of who comes first."""
        return round(self.random.uniform(least, most), 6)

    def program(self) -> Program:
        while True:
            handlers = [self.handlers(kind) for kind in range(TYPES)]
            program: Program = {
                "way": "background"
                if self.background
                else self.random.choice(["dispatch", "context", "drain"]),
                "sequential": self.chance(0.2),
                "limit": self.seconds(1, 12) if self.chance(0.5) else None,
                "observed": self.chance(0.3),
                "handlers": handlers,
                "units": self.units(),
                "concurrency": self.random.randint(1, 4),
                "close": self.close(),
                "around": self.around(),
                "beside": self.beside,
                "closes": None,
                "triggers": [],
            }
            if self.flavour != "plain":
                program["triggers"] = [
                    self.trigger() for _ in range(self.random.choice([1, 1, 1, 2, 3]))
                ]
            if self.deliveries(program) <= 120:
                if not self.background and self.chance(0.1):
                    self.close_from_outside(program)
                return program

    def close_from_outside(self, program: Program) -> None:
        """Have the coroutine closed, as nobody does who has tasks: no handler may have any."""
        for handlers in program["handlers"]:
            del handlers[1:]
            for handler in handlers:
                handler["ops"] = [
                    op
                    for op in handler["ops"]
                    if not {"group", "cleanup", "in thread"} & {each[0] for each in all_ops([op])}
                ]
                if handler["thread"]:
                    handler |= {"thread": False, "ops": []}
        if program["way"] == "drain":
            program["way"] = "context"
        program |= {"beside": False, "around": None, "triggers": []}
        program["closes"] = self.random.randint(0, 6)

    def deliveries(self, program: Program) -> int:
        costs = [0] * TYPES
        for kind in reversed(range(TYPES)):
            handlers = program["handlers"][kind]
            costs[kind] = len(handlers) + sum(
                costs[op[1]]
                for handler in handlers
                for op in all_ops(handler["ops"])
                if op[0] in ("publish", "dispatch")
            )
        return sum(
            costs[kind]
            for unit in program["units"]
            for chunk in unit["chunks"]
            for kind, _ in chunk
        )

    def handlers(self, kind: int) -> list[Any]:
        sizes = [0, 1, 1, 2, 2, 3, 3, 4, 5, 6] if kind < TYPES - 1 else [1, 1, 2, 3]
        return [self.handler(kind) for _ in range(self.random.choice(sizes))]

    def handler(self, kind: int) -> dict[str, Any]:
        if self.threads and self.chance(0.3):
            steps = [self.thread_op(kind) for _ in range(self.random.randint(0, 2))]
            return {"thread": True, "timeout": self.random.choice(["bus", None]), "ops": steps}
        steps = [] if self.chance(0.2) else self.ops(kind, self.random.randint(1, 4), 0)
        return {"thread": False, "ops": steps} | self.timeout()

    def timeout(self) -> dict[str, Any]:
        if self.chance(0.85):
            return {"timeout": "bus"}
        return {"timeout": self.seconds(0.5, 12) if self.chance(0.7) else None}

    def thread_op(self, kind: int) -> Op:
        return self.random.choice(
            [["back"], ["raise", "boom"], self.publish(kind), ["look"], ["look"], ["back"]]
        )

    def publish(self, kind: int) -> Op:
        if kind == TYPES - 1:
            return ["check", 1]
        return ["publish", self.random.randint(kind + 1, TYPES - 1), self.chance(0.3)]

    def ops(self, kind: int, number: int, depth: int, *, child: bool = False) -> list[Op]:
        return [self.op(kind, depth, child) for _ in range(number)]

    def op(self, kind: int, depth: int, child: bool) -> Op:
        simple: list[tuple[float, Callable[[], Op]]] = [
            (4, lambda: ["check", self.random.randint(1, 3)]),
            (3, lambda: ["sleep", self.seconds()]),
            (1, lambda: ["look"]),
            (0.6, lambda: ["raise", "boom"]),
            (0.15, lambda: ["raise", "group"]),
        ]
        if self.threads:
            simple.append((1, lambda: ["in thread", self.chance(0.5)]))
        if not child:
            simple += [
                (1.5, lambda: ["set", self.random.randint(0, 2)]),
                (1.5, lambda: ["wait", self.random.randint(0, 2), self.seconds(20, 40)]),
                (2.5, lambda: self.publish(kind)),
                (0.3, lambda: ["release"]),
            ]
            if kind < TYPES - 1:
                simple.append((0.8, lambda: ["dispatch", self.random.randint(kind + 1, TYPES - 1)]))
            if self.flavour == "wild":
                simple += [
                    (0.3, lambda: ["raise", self.random.choice(["interrupt", "exit", "worse"])]),
                    (0.3, lambda: ["raise", self.random.choice(["cancelled", "mixed"])]),
                ]
                if self.native and not self.beside:
                    simple.append((0.5, lambda: ["cancel self", self.random.randint(0, 2)]))
                if self.background and depth == 0 and not self.beside:
                    simple.append((0.2, lambda: ["leave open", self.chance(0.5)]))
        if depth < 2:
            more = partial(self.ops, kind, depth=depth + 1, child=child)
            simple += [
                (0.8, lambda: ["deadline", self.seconds(), more(self.some())]),
                (0.5, lambda: ["scope", more(self.some())]),
                (0.8, lambda: ["shield", self.shielded()]),
                (0.8, lambda: ["group", self.children(kind, depth)]),
                (0.6, lambda: ["swallow", more(self.some())]),
                (0.6, lambda: ["cleanup", more(self.some()), self.shielded()]),
            ]
            if self.native:
                simple.append((0.4, lambda: ["native", self.seconds(), more(self.some())]))
            if not child:
                simple.append((0.7, lambda: ["nested", self.chance(0.3), more(self.some())]))
        weights, makers = zip(*simple, strict=True)
        return cast("Callable[[], Op]", self.random.choices(makers, weights)[0])()

    def some(self) -> int:
        return self.random.randint(1, 3)

    def shielded(self) -> list[Op]:
        choices: list[Callable[[], Op]] = [
            lambda: ["check", self.random.randint(1, 3)],
            lambda: ["sleep", self.seconds()],
        ]
        if self.threads:
            choices.append(lambda: ["in thread", self.chance(0.5)])
        return [self.random.choice(choices)() for _ in range(self.some())]

    def children(self, kind: int, depth: int) -> list[list[Op]]:
        return [self.ops(kind, self.some(), depth + 1, child=True) for _ in range(self.some())]

    def units(self) -> list[dict[str, Any]]:
        many = self.random.randint(1, 6 if self.background else 1)
        return [
            {
                "chunks": [
                    [
                        [self.random.randint(0, TYPES - 1), self.chance(0.2)]
                        for _ in range(self.random.choice([1, 1, 2, 3, 6]))
                    ]
                    for _ in range(1 if self.background else self.random.randint(1, 3))
                ],
                "success": self.beside or self.chance(0.85),
                "pause": self.pause(),
                "early": self.chance(0.5),
            }
            for _ in range(many)
        ]

    def pause(self) -> Op:
        return self.random.choice([["check", 0], ["check", 2], ["sleep", self.seconds(0.1, 5)]])

    def close(self) -> float | None:
        if self.flavour == "plain" or self.chance(0.5):
            return None
        return self.random.choice([0.0, self.seconds(0.1, 5)])

    def around(self) -> list[Any] | None:
        if self.flavour == "plain" or self.chance(0.7):
            return None
        kinds = ["deadline", "native"] if self.native else ["deadline"]
        return [self.random.choice(kinds), self.seconds()]

    def trigger(self) -> dict[str, Any]:
        when = self.random.choice(["step", "step", "yield", "turn", "time"])
        at: float = self.random.randint(0, self.random.choice([3, 10, 40]))
        if when == "time":
            at = self.seconds()
        actions = ["scope", "native", "worker", "worker"] if self.native else ["scope"]
        if self.background:
            actions = ["owner", "close"]
            actions += ["worker", "worker", "native"] if self.native else []
        return {
            "when": when,
            "at": at,
            "soon": self.chance(0.6),
            "action": self.random.choice(actions),
            "which": self.random.randint(0, 3),
            "seconds": self.random.choice([0.0, self.seconds(0.1, 5)]),
        }


def all_ops(ops: Sequence[Op]) -> Iterator[Op]:
    """These and all inside them."""
    for op in ops:
        yield op
        for argument in op[1:]:
            if isinstance(argument, list) and argument:
                if op[0] == "group":
                    for child in argument:
                        yield from all_ops(child)
                else:
                    yield from all_ops(argument)


def ops_of(program: Program) -> set[str]:
    """What its handlers do: `raise interrupt`, `sleep` and so on."""
    return {
        f"{op[0]} {op[1]}" if op[0] == "raise" else op[0]
        for handlers in program["handlers"]
        for handler in handlers
        for op in all_ops(handler["ops"])
    } | {"thread" for handlers in program["handlers"] for each in handlers if each["thread"]}
