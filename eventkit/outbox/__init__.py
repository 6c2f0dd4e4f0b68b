"""Durable deliveries: what is committed reaches its durable handlers, whatever dies.

`Outbox(bus, engine)` keeps the deliveries of handlers that are subscribed with `durable=True`.
"""

try:
    import pydantic as _pydantic
    import sqlalchemy as _sqlalchemy
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        f"eventkit.outbox needs {_missing.name}, which is not installed: install "
        "fastapi-eventkit[outbox]",
        name=_missing.name,
    ) from _missing

from eventkit.outbox._outbox import Outbox, complete_with
from eventkit.outbox._store import OutboxStats, StoredDelivery, add_tables

__all__ = ["Outbox", "OutboxStats", "StoredDelivery", "add_tables", "complete_with"]

for _name in __all__:
    globals()[_name].__module__ = __name__

del _pydantic, _sqlalchemy
