"""Published models, one file each: what was built, and what was printed of it.

``get_config`` is the model; ``PUBLISHED`` holds the printed numbers that the count is held to.
"""
