"""Owns how the demo uses the command `eventkit outbox`, as somebody at a terminal would."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import anyio

from examples.shop.settings import Settings

_ROOT = Path(__file__).parents[2]
_OUTBOX = "examples.shop.main:outbox"


@dataclass(frozen=True, slots=True)
class Said:
    """A command that has ended: as it was given, what it printed, and its exit code."""

    line: str
    output: str
    status: int


class OutboxCommand:
    """Runs `eventkit outbox` for the shop that has these settings, each time in a new process."""

    def __init__(self, settings: Settings) -> None:
        self._environment = os.environ | settings.to_env()

    async def run(self, verb: str, *arguments: str) -> Said:
        """Run `eventkit outbox <verb>` for the shop."""
        words = ["eventkit", "outbox", verb, _OUTBOX, *arguments]
        ended = await anyio.run_process(
            [sys.executable, "-m", *words],
            stderr=subprocess.STDOUT,
            cwd=_ROOT,
            env=self._environment,
            check=False,
        )
        return Said(" ".join(words), ended.stdout.decode().rstrip(), ended.returncode)
