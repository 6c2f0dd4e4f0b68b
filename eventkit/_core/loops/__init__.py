"""What differs between asyncio and trio, and how code that runs on neither reaches one of them."""
