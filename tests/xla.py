"""Flags with which XLA compiles several times as fast; it partitions and fuses as always."""

import importlib.metadata

_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
_LAST_WITH_EMITTERS = (0, 11, 0)


def _version(package: str) -> tuple[int, ...]:
    numbers = importlib.metadata.version(package).split(".")[:3]
    return tuple(int(number) for number in numbers if number.isdigit())


# LLVM's work alone.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    # XLA ends a process that names a flag it does not know.
    *([_EMITTERS] if _version("jaxlib") <= _LAST_WITH_EMITTERS else []),
)
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
