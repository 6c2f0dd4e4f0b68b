"""Watch eventkit work: the shop under real requests, each with a timeline of what happened when.

    python -m examples.demo                # some cases, exit code 0 if all went as told
    python -m examples.demo --serve        # keep the shop running and try it with curl
    python -m examples.demo --trace        # an order as OpenTelemetry sees it
    python -m examples.demo --svg PATH     # the timeline of one request, as a picture
    python -m examples.demo two-services   # two services and a broker, see `two_services`

The shop runs on uvicorn in a process of its own (`server.py`, `witness.py`) and talks to a mail
server and a warehouse (`neighbours.py`). It tells what it does as lines of JSON, which `trace.py`
collects; `cases.py` sends the requests and says what must be true; `play.py` is the course of it
all. `timeline.py` draws on a terminal and `picture.py` in a file, both on the axis of `axis.py`.
With `--trace` the course is that of `traced.py`, and `spans.py` draws.
"""
