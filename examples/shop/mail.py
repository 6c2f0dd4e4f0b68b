"""Owns how mail leaves the shop. Knows nothing of why."""

from __future__ import annotations

import smtplib
from dataclasses import dataclass
from email.message import EmailMessage
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Mailer:
    """Sends plain text over SMTP. Blocks, as the standard library's client does.

    Attributes:
        host: The mail server's address.
        port: The mail server's port.
        sender: Whom the mail is from.
        timeout: Seconds to wait for the server at each step.
    """

    host: str
    port: int
    sender: str = "shop@shop.example"
    timeout: float = 10.0

    def send(self, to: str, subject: str, text: str, *, key: UUID) -> None:
        """Hand one mail to the server; returns when the server has accepted it.

        Where nobody knows whether it has, sending again with the same key is safe: it becomes the
        `Message-ID`, by which a mailbox shows a mail once that has come twice.

        Raises:
            OSError: The server cannot be reached, is too slow, or refuses.
        """
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = self.sender, to, subject
        message["Message-ID"] = f"<{key}@shop.example>"
        message.set_content(text)
        # Left to itself, smtplib asks the DNS for our own name, which can take seconds.
        with smtplib.SMTP(
            self.host, self.port, local_hostname="shop.example", timeout=self.timeout
        ) as server:
            server.send_message(message)
