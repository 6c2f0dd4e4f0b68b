"""The private core. Public names are in `eventkit`, its public modules, and `eventkit.testing`."""
