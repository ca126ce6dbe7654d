"""``python -m moe_jax.evaluate`` is the command ``moe-jax evaluate``."""

from moe_jax.cli.main import main

if __name__ == "__main__":
    main("evaluate")
