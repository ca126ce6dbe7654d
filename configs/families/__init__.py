"""What published models of one family share; ``configs/published`` says how they differ."""
