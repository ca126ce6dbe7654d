"""Machines for plans: the published peaks of their chips, and devices to compile for.

The name of a topology is ``CHIP:SHAPE``: ``v5p:8x8x16`` and ``v5e:16x16`` are TPU slices with the
number of chips along each side, ``h100:64`` has 64 GPUs, and ``cpu:8`` has 8 simulated devices.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax

from moe_jax.errors import ConfigError, nearest

GB = 1e9
GIB = 2.0**30
TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published numbers of a chip.

    Attributes:
        name: Name in ``--topology``.
        kind: Kind of compilation: ``tpu`` compiles with ``libtpu``, ``gpu`` is not compiled, and
            ``cpu`` compiles for simulated devices of this machine.
        flops: Dense bfloat16 FLOP/s; 0 if no number is published.
        hbm: Bytes of memory for programs.
        hbm_bandwidth: Bandwidth of the memory in bytes/s.
        link_bandwidth: Bandwidth of one link in one direction in bytes/s.
        links: Number of links of a chip, to its neighbours in the torus (TPU) or to a switch (GPU).
        domain: Number of GPUs that links connect; the links of TPUs connect the whole slice.
        network: Bandwidth of a GPU to other domains in one direction in bytes/s.
        devices: Number of JAX devices per chip, which share all resources equally.
        kinds: Starts of the names that JAX gives to the devices (``device_kind``).
        sources: Sources of the numbers.
    """

    name: str
    kind: Literal["tpu", "gpu", "cpu"]
    flops: float = 0.0
    hbm: float = 0.0
    hbm_bandwidth: float = 0.0
    link_bandwidth: float = 0.0
    links: int = 0
    domain: int = 0
    network: float = 0.0
    devices: int = 1
    kinds: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def device_flops(self) -> float:
        """FLOP/s of one JAX device."""
        return self.flops / self.devices

    @property
    def device_hbm(self) -> float:
        """Bytes of memory of one JAX device."""
        return self.hbm / self.devices

    @property
    def device_bandwidth(self) -> float:
        """Bandwidth of the memory of one JAX device in bytes/s."""
        return self.hbm_bandwidth / self.devices


_TPU_DOCS = "https://docs.cloud.google.com/tpu/docs/"

# The pages print the bandwidth of all links of a chip in both directions together. A chip has 4
# links in a 2D torus and 6 in a 3D torus.
_CHIPS = (
    Chip(
        "v4",
        "tpu",
        kinds=("TPU v4",),
        flops=275 * TERA,
        hbm=32 * GIB,
        hbm_bandwidth=1200 * GB,
        link_bandwidth=50 * GB,
        links=6,
        sources=(
            f"{_TPU_DOCS}v4: 275 TFLOPs, 32 GiB, 1200 GBps",
            "https://arxiv.org/abs/2304.01433 table 4: six links of 50 GB/s",
        ),
    ),
    Chip(
        "v5e",
        "tpu",
        kinds=("TPU v5 lite", "TPU v5e"),
        flops=197 * TERA,
        hbm=16 * GIB,
        hbm_bandwidth=819 * GB,
        link_bandwidth=50 * GB,
        links=4,
        sources=(f"{_TPU_DOCS}v5e: 197 TFLOPs, 16 GB, 819 GBps, 4 ports, 400 GBps both ways",),
    ),
    Chip(
        "v5p",
        "tpu",
        kinds=("TPU v5", "TPU v5p"),
        flops=459 * TERA,
        hbm=95 * GIB,
        hbm_bandwidth=2765 * GB,
        link_bandwidth=100 * GB,
        links=6,
        sources=(f"{_TPU_DOCS}v5p: 459 TFLOPs, 95 GiB, 2765 GBps, 1200 GBps both ways, 3D torus",),
    ),
    Chip(
        "v6e",
        "tpu",
        kinds=("TPU v6 lite", "TPU v6e"),
        flops=918 * TERA,
        hbm=32 * GIB,
        hbm_bandwidth=1638 * GB,
        link_bandwidth=100 * GB,
        links=4,
        sources=(
            f"{_TPU_DOCS}v6e and {_TPU_DOCS}tpu7x: 918 TFLOPs, 32 GiB, 1638 GBps, "
            "800 GBps both ways, 2D torus",
        ),
    ),
    Chip(
        "tpu7x",
        "tpu",
        kinds=("TPU7x", "TPU v7x", "TPU v7"),
        flops=2307 * TERA,
        hbm=192 * GIB,
        hbm_bandwidth=7380 * GB,
        link_bandwidth=100 * GB,
        links=6,
        devices=2,
        sources=(
            f"{_TPU_DOCS}tpu7x: 2307 TFLOPs in bfloat16, 192 GiB, 7380 GBps, 1200 GBps both ways; "
            "two devices a chip",
        ),
    ),
    Chip(
        "a100",
        "gpu",
        kinds=("NVIDIA A100",),
        flops=312 * TERA,
        hbm=80 * GB,
        hbm_bandwidth=2039 * GB,
        link_bandwidth=25 * GB,
        links=12,
        domain=8,
        network=25 * GB,
        sources=(
            "https://www.nvidia.com/en-us/data-center/a100/: SXM 80 GB, 312 TFLOPS dense, "
            "2039 GB/s, NVLink 600 GB/s both ways",
            "https://docs.nvidia.com/dgx/dgxa100-user-guide/: one 200 Gb/s adapter a GPU",
        ),
    ),
    Chip(
        "h100",
        "gpu",
        # Other boards of the H100 have another peak.
        kinds=("NVIDIA H100 80GB HBM3",),
        flops=989 * TERA,
        hbm=80 * GB,
        hbm_bandwidth=3350 * GB,
        link_bandwidth=25 * GB,
        links=18,
        domain=8,
        network=50 * GB,
        sources=(
            "https://www.nvidia.com/en-us/data-center/h100/: SXM, 1979 TFLOPS with sparsity, half "
            "of it dense, 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways",
            "https://docs.nvidia.com/dgx/dgxh100-user-guide/: one 400 Gb/s adapter a GPU",
        ),
    ),
    Chip(
        "h200",
        "gpu",
        kinds=("NVIDIA H200",),
        flops=989 * TERA,
        hbm=141 * GB,
        hbm_bandwidth=4800 * GB,
        link_bandwidth=25 * GB,
        links=18,
        domain=8,
        network=50 * GB,
        sources=(
            "https://www.nvidia.com/en-us/data-center/h200/: SXM, 1979 TFLOPS with sparsity, half "
            "of it dense, 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways",
            "https://docs.nvidia.com/dgx/dgxh100-user-guide/: one 400 Gb/s adapter a GPU",
        ),
    ),
    Chip(
        "b200",
        "gpu",
        kinds=("NVIDIA B200",),
        flops=2250 * TERA,
        hbm=180 * GB,
        hbm_bandwidth=8000 * GB,
        link_bandwidth=50 * GB,
        links=18,
        domain=8,
        network=50 * GB,
        sources=(
            "https://www.nvidia.com/en-us/data-center/dgx-b200/: eight GPUs have 1,440 GB, "
            "64 TB/s, 14.4 TB/s NVLink, one 400 Gb/s adapter a GPU",
            "https://www.nvidia.com/en-us/data-center/hgx/: 36 PFLOPS with sparsity, half of it "
            "dense, over eight GPUs",
        ),
    ),
    Chip("cpu", "cpu"),
)
CHIPS = {chip.name: chip for chip in _CHIPS}
_OTHER_BOARDS = ("NVIDIA H200 NVL",)
_EXAMPLES = "v5p:8x8x16, v5e:16x16, h100:64 or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine of equal chips.

    Attributes:
        chip: The chip.
        shape: Number of chips along each side of a TPU slice, or the number of all chips.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the topology, such as ``v5p:8x8x16``."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """Number of JAX devices."""
        return self.num_chips * self.chip.devices

    def devices(self) -> list[Any]:
        """Returns devices to compile for, which need not exist.

        Simulated devices need a call of ``prepare`` before JAX initialises its devices.

        Raises:
            ConfigError: If the devices are GPUs, JAX has too few simulated devices, ``libtpu`` does
                not know the slice, or ``libtpu`` is not installed.
        """
        if self.chip.kind == "gpu":
            raise ConfigError(
                f"{self.name} has GPUs, which need no compilation: the plan is analytic"
            )
        if self.chip.kind == "cpu":
            found = jax.devices("cpu")
            if len(found) < self.num_devices:
                raise ConfigError(
                    f"{self.name} needs {self.num_devices} simulated devices, but JAX started with "
                    f"{len(found)}: run the plan in a process of its own"
                )
            return found[: self.num_devices]
        return self._tpu_devices()

    def _tpu_devices(self) -> list[Any]:
        from jax.experimental import topologies

        options: dict[str, Any] = {}
        if self.chip.name == "v4":
            # The two cores of a v4 chip are one JAX device, as on real machines.
            options["chip_config_name"] = "megacore"
        if math.prod(self.shape) < 4:
            options["chips_per_host_bounds"] = (*self.shape, 1, 1)[:3]
        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=self.name, **options
            ).devices
        except Exception as error:  # the plugin raises several types
            raise ConfigError(_refused(self, error)) from error
        if len(found) != self.num_devices:
            raise ConfigError(
                f"libtpu returned {len(found)} devices for {self.name}, not {self.num_devices}: "
                "this version counts chips differently"
            )
        return list(found)


def _refused(topology: Topology, error: Exception) -> str:
    if importlib.util.find_spec("libtpu") is None:
        return (
            f"{topology.name} is compiled by libtpu, which is not installed: "
            "pip install 'jax[tpu]' (the extra tpu of this package)"
        )
    return f"libtpu knows no slice {topology.name}: {' '.join(str(error).split())[:300]}"


def parse(text: str) -> Topology:
    """Returns the topology with the name ``text``.

    Raises:
        ConfigError: If the chip is unknown, or the shape is invalid for the chip.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise ConfigError(f"--topology: no chip is called {name!r}{nearest(name, CHIPS)}")
    chip = CHIPS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ConfigError(f"--topology={text} is not CHIP:SHAPE, such as {_EXAMPLES}")
    sides = tuple(int(side) for side in shape.split("x"))
    expected = 1 if chip.kind != "tpu" else 2 if chip.links == 4 else 3
    if len(sides) != expected:
        example = {1: "64", 2: "16x16", 3: "8x8x16"}[expected]
        what = "number" if expected == 1 else f"shape of {expected} sides"
        raise ConfigError(f"--topology={text}: {name} takes a {what}, such as {name}:{example}")
    return Topology(chip, sides)


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of devices that JAX calls ``device_kind``; ``None`` for unknown devices.

    The longest name decides: ``TPU v5 lite`` is a v5e, and ``TPU v5`` a v5p.
    """
    if device_kind.startswith(_OTHER_BOARDS):
        return None
    fitting = {kind: chip for chip in _CHIPS for kind in chip.kinds if device_kind.startswith(kind)}
    return fitting[max(fitting, key=len)] if fitting else None


def peak_of(devices: Sequence[Any]) -> float:
    """Returns the dense bfloat16 FLOP/s of all devices together; 0 if a device is unknown."""
    chips = [chip_of(device.device_kind) for device in devices]
    return 0.0 if None in chips else sum(chip.device_flops for chip in chips if chip)


def prepare(topology: Topology) -> None:
    """Restricts JAX to this machine's CPU, with one simulated device per device of a CPU topology.

    The call must precede the initialisation of JAX's devices.
    """
    # Without these variables libtpu searches for the metadata server of a TPU, logs the search, and
    # rejects a second process.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-4")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.kind == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.num_devices)
