"""``python -m moe_jax.count`` is the command ``moe-jax count``; imported, it is the function."""

import sys

from moe_jax.cli.main import main

if __name__ == "__main__":
    main("count")
else:
    from moe_jax.counting.by_name import count

    # An import of this module puts it in the place of the function, unless it is the function.
    sys.modules[__name__] = count  # type: ignore[assignment]
