"""Things that are sold."""
