"""Owns the demo as a program: its options, its terminal, its exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import cast

import anyio
from rich.console import Console

from examples.demo.play import play, play_pictured
from examples.demo.process import until_signal
from examples.demo.serve import serve
from examples.demo.traced import play_traced

_WIDTH = 100
_AS_TOLD, _NOT_AS_TOLD, _INTERRUPTED = 0, 1, 130


def main() -> int:
    """Run the demo and return its exit code."""
    options = _options()
    console = _console()
    if options.what == "two-services":
        # Imported when used: it needs FastStream, and the shop does not.
        from examples.demo.two_services.play import play as play_two_services
        from examples.demo.two_services.traced import play_traced as play_two_traced

        course = play_two_traced if options.trace else play_two_services
    elif options.serve:
        return 0 if anyio.run(partial(serve, console, port=options.port)) else 1
    elif options.svg:
        course = partial(play_pictured, path=options.svg)
    else:
        course = play_traced if options.trace else play
    return anyio.run(_until_told, partial(course, console))


async def _until_told(course: Callable[[], Awaitable[bool]]) -> int:
    async with until_signal():
        return _AS_TOLD if await course() else _NOT_AS_TOLD
    return _INTERRUPTED


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description="Watch eventkit work in a small shop."
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=["shop", "two-services"],
        default="shop",
        help="what to watch (default: %(default)s); two services need a broker",
    )
    parser.add_argument(
        "--serve", action="store_true", help="keep the shop running, to try it with curl"
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="show one order as OpenTelemetry sees it: a tree of spans, written to a file",
    )
    parser.add_argument(
        "--svg",
        type=Path,
        metavar="PATH",
        help="write the timeline of one request to PATH, as an SVG picture",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="where to serve (default: %(default)s; 0: any)"
    )
    options = parser.parse_args()
    for option in ("serve", "svg"):
        if getattr(options, option) and options.what != "shop":
            parser.error(f"--{option} is for the shop")
    chosen = [f"--{each}" for each in ("serve", "svg", "trace") if getattr(options, each)]
    if len(chosen) > 1:
        parser.error(f"{' and '.join(chosen)} do not go together")
    return options


def _console() -> Console:
    """A console that draws the same in a terminal and in a CI log."""
    cast("TextIOWrapper", sys.stdout).reconfigure(encoding="utf-8")
    console = Console(highlight=False)
    if not console.is_terminal or console.width > _WIDTH:
        console.width = _WIDTH
    return console


if __name__ == "__main__":
    sys.exit(main())
