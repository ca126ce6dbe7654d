"""Settings with which programs compile faster and simulated devices wait longer.

XLA partitions and fuses the programs as always.
"""

import importlib.metadata
import os
import shutil
import threading
from pathlib import Path

_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
_LAST_WITH_EMITTERS = (0, 11, 0)


def _version(package: str) -> tuple[int, ...]:
    numbers = importlib.metadata.version(package).split(".")[:3]
    return tuple(int(number) for number in numbers if number.isdigit())


# LLVM's work alone.
QUICK = (
    # On a busy machine, a device may reach a collective later than after XLA's 40 seconds.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    # XLA ends a process that names a flag it does not know.
    *([_EMITTERS] if _version("jaxlib") <= _LAST_WITH_EMITTERS else []),
)
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
_PROGRAMS_PER_CONTEXT = 100
_MOST_BYTES = 2**31


def share_contexts() -> None:
    """Lets a hundred programs share an MLIR context.

    JAX makes a context for each program, which takes a tenth of the time of a small program and
    stays in memory, nearly a megabyte, as long as the program does.
    """
    from jax._src.interpreters import mlir

    made, mine = getattr(mlir, "make_ir_context", None), threading.local()
    if made is None:
        return

    def shared():
        programs = getattr(mine, "programs", 0)
        if programs % _PROGRAMS_PER_CONTEXT == 0:
            mine.context = made()
        mine.programs = programs + 1
        return mine.context

    mlir.make_ir_context = shared


def keep_programs(folder: Path) -> None:
    """Lets the tests of the next run load the programs that this run compiles.

    Processes that tests start do not share the folder: tests kill some of them, perhaps while they
    write.
    """
    import jax

    if "PYTEST_XDIST_WORKER" not in os.environ and _bytes_in(folder) > _MOST_BYTES:
        shutil.rmtree(folder, ignore_errors=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*")) if folder.is_dir() else 0
