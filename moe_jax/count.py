"""``python -m moe_jax.count`` is the command ``moe-jax count``."""

from moe_jax.cli.main import main

if __name__ == "__main__":
    main("count")
