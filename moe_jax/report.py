"""``python -m moe_jax.report`` is the command ``moe-jax report``."""

from moe_jax.cli.main import main

if __name__ == "__main__":
    main("report")
