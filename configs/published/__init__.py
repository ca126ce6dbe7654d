"""Published models, one file each, with the numbers that the papers print.

``get_config`` returns the model; tests compare its counts with the numbers in ``PUBLISHED``.
"""
