"""``python -m moe_jax.bench`` is the command ``moe-jax bench``."""

from moe_jax.cli.main import main

if __name__ == "__main__":
    main("bench")
