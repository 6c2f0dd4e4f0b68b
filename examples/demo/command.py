"""Owns how the demo uses the command `eventkit outbox`, as somebody at a terminal would."""

from __future__ import annotations

import importlib.util
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


def _program() -> list[str]:
    if importlib.util.find_spec("eventkit.__main__"):
        return ["-m", "eventkit", "outbox"]
    return ["-c", _BY_API]  # until the command is there


_BY_API = """
import sys, json, anyio, uuid
from examples.shop.main import outbox
async def main():
    if sys.argv[1] == "list":
        for d in await outbox.deliveries():
            print(d.id, d.handler, d.error)
    else:
        print("retried", await outbox.retry([uuid.UUID(sys.argv[-1])]))
anyio.run(main)
"""


class OutboxCommand:
    """Runs `eventkit outbox` for the shop that has these settings, each time in a new process."""

    def __init__(self, settings: Settings) -> None:
        self._environment = os.environ | settings.to_env()

    async def run(self, verb: str, *arguments: str) -> Said:
        """Run `eventkit outbox <verb>` for the shop."""
        words = ["eventkit", "outbox", verb, _OUTBOX, *arguments]
        ended = await anyio.run_process(
            [sys.executable, *_program(), *words[2:]],
            stderr=subprocess.STDOUT,
            cwd=_ROOT,
            env=self._environment,
            check=False,
        )
        return Said(" ".join(words), ended.stdout.decode().rstrip(), ended.returncode)
