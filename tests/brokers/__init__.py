"""The bridge on real brokers, which are killed and cut off, as are the processes that use them."""
