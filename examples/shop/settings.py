"""Owns what can be configured, and where it comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Settings:
    """What differs between a laptop, a test and production.

    Attributes:
        database_url: An SQLite file, as `sqlite:///path`.
        smtp_host: The mail server's address.
        smtp_port: The mail server's port.
        warehouse_url: Whom to tell when something leaves the stock.
        payments_url: Where charges are collected.
        credit_limit_cents: Orders above it are declined.
        lease_seconds: How long nobody else does the work of a process that was killed.
        spans: A file for what OpenTelemetry sees, in lines of JSON; empty where it is not asked.
    """

    database_url: str = "sqlite:///shop.db"
    smtp_host: str = "127.0.0.1"
    smtp_port: int = 1025
    warehouse_url: str = "http://127.0.0.1:8001/stock"
    payments_url: str = "http://127.0.0.1:8002/charges"
    credit_limit_cents: int = 30_000
    lease_seconds: float = 15.0
    spans: str = ""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read `SHOP_DATABASE_URL`, `SHOP_SMTP_HOST` and so on; what is unset keeps its default."""
        default = cls()
        return cls(
            database_url=environ.get("SHOP_DATABASE_URL", default.database_url),
            smtp_host=environ.get("SHOP_SMTP_HOST", default.smtp_host),
            smtp_port=int(environ.get("SHOP_SMTP_PORT", default.smtp_port)),
            warehouse_url=environ.get("SHOP_WAREHOUSE_URL", default.warehouse_url),
            payments_url=environ.get("SHOP_PAYMENTS_URL", default.payments_url),
            credit_limit_cents=int(
                environ.get("SHOP_CREDIT_LIMIT_CENTS", default.credit_limit_cents)
            ),
            lease_seconds=float(environ.get("SHOP_LEASE_SECONDS", default.lease_seconds)),
            spans=environ.get("SHOP_SPANS", default.spans),
        )

    def to_env(self) -> dict[str, str]:
        """The reverse of `from_env`, to configure a process that is about to start."""
        return {
            f"SHOP_{field.name.upper()}": str(getattr(self, field.name)) for field in fields(self)
        }
