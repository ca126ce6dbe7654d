import importlib
import pkgutil

from absl import flags

import experiments


def test_every_module_is_imported_beside_the_others():
    # Two modules that define one flag at their import cannot both be imported.
    names = [found.name for found in pkgutil.walk_packages(experiments.__path__, "experiments.")]
    assert {"moe_jax.cli.ablate", "moe_jax.ablation.index", "experiments.switch.distillation"} <= {
        *names
    }
    for name in names:
        importlib.import_module(name)
    defined = flags.FLAGS.flags_by_module_dict()
    assert [name for name in defined if name.startswith("experiments")] == []
