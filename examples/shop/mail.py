"""Owns how mail leaves the shop. Knows nothing of why."""

from __future__ import annotations

import smtplib
from dataclasses import dataclass
from email.message import EmailMessage


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

    def send(self, to: str, subject: str, text: str) -> None:
        """Hand one mail to the server; returns when the server has accepted it.

        Raises:
            OSError: The server cannot be reached, is too slow, or refuses.
        """
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = self.sender, to, subject
        message.set_content(text)
        # Left to itself, smtplib asks the DNS for our own name, which can take seconds.
        with smtplib.SMTP(
            self.host, self.port, local_hostname="shop.example", timeout=self.timeout
        ) as server:
            server.send_message(message)
