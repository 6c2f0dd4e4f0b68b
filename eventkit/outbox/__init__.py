"""Durable deliveries: a delivery that also has a row, written in the user's transaction."""
