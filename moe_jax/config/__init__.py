"""Settings of a run: typed, ranged and checked before anything starts."""
