"""The private core: everything but the front door, the neighbours' modules and the testing kit."""
