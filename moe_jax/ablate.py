"""``python -m moe_jax.ablate`` is the command ``moe-jax ablate``."""

from moe_jax.cli.main import main

if __name__ == "__main__":
    main("ablate")
