"""Owns how processes live: servers are started, heard and ended by us, ours by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import anyio
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream

from examples.demo.trace import Trace
from examples.shop.settings import Settings

_ROOT = Path(__file__).parents[2]
_LONGEST_LINE = 65_536
_SECONDS_TO_START = 30.0
_SECONDS_TO_STOP = 10.0


class ShopDidNotStart(Exception):
    """The process ended, or took too long, before it could take requests; its log says why."""


@asynccontextmanager
async def shop_process(
    settings: Settings, trace: Trace, log: IO[str] | None, *, port: int = 0
) -> AsyncGenerator[Process]:
    """Run the shop until the block ends; it takes requests from the block's begin on.

    See `telling_process`; `port` 0 is a free one.

    Raises:
        ShopDidNotStart: It ended, or took too long, before it could take requests.
    """
    command = ["examples.demo.server", str(port)]
    async with telling_process(command, settings.to_env(), trace, log) as process:
        await until_up(trace)
        yield process


@asynccontextmanager
async def telling_process(
    command: Sequence[str], environment: Mapping[str, str], trace: Trace, log: IO[str] | None
) -> AsyncGenerator[Process]:
    """Run a server until the block ends, and fill the trace with what it tells.

    Args:
        command: A module, and its arguments.
        environment: Variables beside our own.
        trace: Knows everything when the block has ended. It may have heard of a process before.
        log: Where its stderr goes; None for ours.
    """
    trace.begin()
    async with await anyio.open_process(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=log,
        cwd=_ROOT,
        env={**os.environ, **environment},
        start_new_session=True,  # so that Ctrl-C reaches us alone, and we end it in good order
    ) as process:
        assert process.stdout is not None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(trace.collect, _lines(process.stdout))
            try:
                yield process
            finally:
                await _stop(process)


async def until_up(trace: Trace) -> None:
    """Wait until a process takes requests, at the trace's port.

    Raises:
        ShopDidNotStart: It ended, or took too long.
    """
    if not await trace.until(lambda: trace.port > 0, seconds=_SECONDS_TO_START):
        raise ShopDidNotStart


async def kill(process: Process) -> None:
    """End it with SIGKILL, which gives it no time for anything."""
    process.kill()
    await process.wait()


@asynccontextmanager
async def until_signal() -> AsyncGenerator[None]:
    """Cancel the block at the first SIGINT or SIGTERM, and go on behind it."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_at_first, signals, tasks.cancel_scope)
            yield
            tasks.cancel_scope.cancel()


async def _cancel_at_first(
    signals: AsyncIterator[signal.Signals], scope: anyio.CancelScope
) -> None:
    await anext(signals)
    scope.cancel()


async def _stop(process: Process) -> None:
    """Ask it to end and wait, also where we were cancelled ourselves."""
    if process.returncode is None:
        process.terminate()
    with anyio.move_on_after(_SECONDS_TO_STOP, shield=True):
        await process.wait()


async def _lines(stream: ByteReceiveStream) -> AsyncIterator[str]:
    buffered = BufferedByteReceiveStream(stream)
    while True:
        try:
            yield (await buffered.receive_until(b"\n", _LONGEST_LINE)).decode()
        except (anyio.EndOfStream, anyio.IncompleteRead):
            return
