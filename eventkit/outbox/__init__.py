"""Durable deliveries: rows beside the business rows, and who carries them out."""
