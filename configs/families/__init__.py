"""Common settings of published model families; ``configs/published`` adds their differences."""
