"""Watch an order go through two services and a broker, and stay whole when one is killed.

    python -m examples.demo two-services
    python -m examples.demo two-services --trace   # an order as OpenTelemetry sees it

The services are those of `examples/two_services`, each on uvicorn in a process of its own
(`server.py`). `broker.py` finds a broker or starts one, and has a neighbour that sends what no
service sends. `play.py` is the course of it, `traced.py` that of `--trace`; they say what must be
true.
"""
