"""Durable deliveries: a committed event reaches its durable handlers, also after a crash.

`Outbox(bus, engine)` keeps the deliveries of handlers that are subscribed with `durable=True`.
"""

from eventkit.exceptions import not_installed

try:
    import pydantic as _pydantic
    import sqlalchemy.ext.asyncio as _sqlalchemy
except ImportError as _missing:  # if greenlet is missing, SQLAlchemy's error has no module name
    raise not_installed(__name__, _missing.name or "greenlet", "outbox") from _missing

from eventkit.outbox._keeper import complete_with
from eventkit.outbox._outbox import Outbox
from eventkit.outbox._store import OutboxStats, StoredDelivery, add_tables

__all__ = ["Outbox", "OutboxStats", "StoredDelivery", "add_tables", "complete_with"]

for _name in __all__:
    globals()[_name].__module__ = __name__

del _pydantic, _sqlalchemy
