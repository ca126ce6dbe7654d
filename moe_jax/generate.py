"""``python -m moe_jax.generate`` is the command ``moe-jax generate``."""

from moe_jax.cli.main import main

if __name__ == "__main__":
    main("generate")
