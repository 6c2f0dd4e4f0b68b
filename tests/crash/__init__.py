"""Processes that are killed, stopped and cut off, and what the database says afterwards."""
