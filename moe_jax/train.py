"""``python -m moe_jax.train`` is the command ``moe-jax train``; imported, it is the function."""

import sys

from moe_jax.cli.main import main

if __name__ == "__main__":
    main("train")
else:
    from moe_jax.run.api import train

    # An import of this module puts it in the place of the function, unless it is the function.
    sys.modules[__name__] = train  # type: ignore[assignment]
