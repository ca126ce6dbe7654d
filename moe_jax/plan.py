"""``python -m moe_jax.plan`` is the command ``moe-jax plan``."""

from moe_jax.cli.main import main

if __name__ == "__main__":
    main("plan")
