"""Random programs of handlers, run on the dispatcher and judged: `python -m tests.fuzz --help`.

A program is plain data that a seed gives: handlers as lists of steps, what is published, and who
is cancelled when. `runs.run` has it run on one event loop, and gives what goes wrong.

- Whatever a program does, it keeps laws: conservation, order, who is told what. See `laws.judge`.
- Where nothing comes from outside, each delivery ends as with a task per handler, and its handler
  sees the same. See `runs.compare`.

Time is virtual on asyncio and trio. With uvloop it is real and a thousand times as fast, so what
depends on time is not compared there.
"""
