"""``moe-jax serve`` with the generator of the tests, in a process of its own."""

from moe_jax.cli import main
from moe_jax.serving import engines
from tests.serving.generators import OneByOne


def engine_of(opened, room):
    return OneByOne(opened.model, opened.vocab_size, room.context)


if __name__ == "__main__":
    engines.engine_of = engine_of
    main.main("serve")
