"""``python -m moe_jax.train`` is the command ``moe-jax train``."""

from moe_jax.cli.main import main

if __name__ == "__main__":
    main("train")
