import importlib
import pkgutil

import moe_jax.experiments
from absl import flags

import moe_jax.cli
import tools

PACKAGES = {
    "moe_jax.cli.": moe_jax.cli,
    "moe_jax.experiments.": moe_jax.experiments,
    "tools.": tools,
}


def test_every_command_is_imported_beside_the_others():
    # Two modules that define one flag at their import cannot both be imported.
    names = {
        found.name
        for prefix, package in PACKAGES.items()
        for found in pkgutil.walk_packages(package.__path__, prefix)
    }
    expected = {"moe_jax.cli.ablate", "moe_jax.experiments.switch.distillation", "tools.plans"}
    assert expected <= names
    for name in names:
        importlib.import_module(name)
    defined = flags.FLAGS.flags_by_module_dict()
    assert [name for name in defined if name.startswith(("moe_jax", "tools"))] == []
