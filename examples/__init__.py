"""Programs that use eventkit as its users would."""
