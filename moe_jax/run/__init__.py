"""A run from its folder to its result: session, loop, predecessors and the end."""
