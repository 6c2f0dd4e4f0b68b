"""A small shop, written as a team would write it: what happened here, side effects elsewhere.

Start with `app.py`, which wires handlers and routes, and `resources.py`, which wires the bus, the
database and the outbox. `users/` and `orders/` each hold their events, the use cases that publish
them, the handlers that react, and the routes that lead in from HTTP.

    python -m examples.shop
"""
