"""Owns how money is collected. Knows nothing of why."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import httpx

_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Payments:
    """A provider that collects once per `Idempotency-Key`, however often it is asked. Blocks.

    Attributes:
        http: The client to ask with.
        url: Where charges are made.
    """

    http: httpx.Client
    url: str

    def charge(self, order_id: int, cents: int, *, key: UUID) -> None:
        """Collect it, once for each key.

        Where an answer is lost nobody knows whether the money was taken: asking again with the
        same key is safe, with another one it would be taken twice.

        Raises:
            httpx.HTTPError: The provider declined, or gave no answer.
        """
        charge = {"order_id": order_id, "cents": cents}
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                response = self.http.post(
                    self.url, json=charge, headers={"Idempotency-Key": str(key)}
                )
            except httpx.TransportError:
                if attempt == _ATTEMPTS:
                    raise
            else:
                response.raise_for_status()
                return
