"""Owns the axis of a drawing: where a moment is, and in which unit. Knows nothing of pens."""

from __future__ import annotations

from collections.abc import Iterator

_LONG_NS = 2_000_000_000


class Axis:
    """Says where a moment is drawn, and how long after the start it was.

    Attributes:
        width: How wide it is: in cells of a terminal, or in pixels.
        unit: "ms", or "s" where it is long.
    """

    def __init__(self, start_ns: int, end_ns: int, width: int) -> None:
        self.width = width
        long = end_ns - start_ns > _LONG_NS
        self.unit, self._unit_ns, self._digits = ("s", 1e9, 2) if long else ("ms", 1e6, 1)
        self._start_ns = start_ns
        self._span = max(self.since(end_ns), 1.0)

    def since(self, at_ns: int) -> float:
        """How long after the start, in its unit."""
        return (at_ns - self._start_ns) / self._unit_ns

    def label(self, at_ns: int) -> str:
        """The same in words; 0 is what has not come."""
        return f"{self.since(at_ns):.{self._digits}f}" if at_ns else "never"

    def position(self, since: float) -> float:
        """How far from the left, between 0 and the last cell or pixel."""
        return min(max(since, 0.0) / self._span, 1.0) * (self.width - 1)

    def at(self, moment_ns: int) -> float:
        """Where a moment is."""
        return self.position(self.since(moment_ns))

    def rounds(self, *, at_most: int) -> range:
        """Round numbers of its unit, so many or fewer."""
        steps: Iterator[int] = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
        step = next(step for step in steps if self._span / step <= max(at_most, 1))
        return range(0, int(self._span) + 1, step)
