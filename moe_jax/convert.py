"""``python -m moe_jax.convert`` is the command ``moe-jax convert``."""

from moe_jax.cli.main import main

if __name__ == "__main__":
    main("convert")
