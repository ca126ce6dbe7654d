"""``python -m moe_jax`` is the command ``moe-jax``."""

from moe_jax.cli.main import main

if __name__ == "__main__":
    main()
