"""The differences between asyncio and trio, and the ways to an event loop from other threads."""
