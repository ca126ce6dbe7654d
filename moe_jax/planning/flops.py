"""Counts the floating-point operations of a compiled program: matrix products and kernels.

Plans compile for CPUs and TPUs, whose compilers write a matrix product as ``dot`` or as
``convolution``. Every product counts once per execution: the body of a loop counts once per
iteration, which ``cost_analysis`` of JAX does not do.
"""

from __future__ import annotations

import dataclasses
import math
import re

from moe_jax.planning import hlo

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_KERNEL = 'custom_call_target="tpu_custom_call"'


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of one execution of a program on one device.

    Attributes:
        products: FLOPs of matrix products; a multiplication and an addition are two.
        kernels: FLOPs of kernels, by their cost estimates.
        without_estimate: Executions of each kernel that has no cost estimate, by its name.
    """

    products: float
    kernels: float
    without_estimate: dict[str, int]


def count(text: str) -> Flops:
    """Returns the FLOPs of a compiled program.

    Args:
        text: ``compiled.as_text()``.
    """
    program = hlo.parse(text)
    products = kernels = 0.0
    unknown: dict[str, int] = {}
    for name, times in program.times.items():
        computation = program.computations[name]
        for one in computation:
            if one.operation == "dot":
                products += times * _dot(one, *_operands(one, computation))
            elif one.operation == "convolution":
                products += times * _convolution(one, *_operands(one, computation))
            elif one.operation == "custom-call" and _KERNEL in one.line:
                estimate = _ESTIMATE.search(one.line)
                if estimate:
                    kernels += times * int(estimate[1])
                else:
                    kernel = re.sub(r"[.\d]+$", "", one.name)
                    unknown[kernel] = unknown.get(kernel, 0) + times
    return Flops(products, kernels, unknown)


def _sizes(type_: str) -> list[int]:
    """Returns the sizes of the axes of an array's type."""
    inside = type_.partition("[")[2].partition("]")[0]
    return [int(size) for size in inside.split(",") if size]


def _operands(one: hlo.Instruction, computation: list[hlo.Instruction]) -> list[list[int]]:
    return [_sizes(type_) for type_ in hlo.operands(one, computation)[:2]]


def _dot(one: hlo.Instruction, left: list[int], right: list[int]) -> float:
    del right
    contracted = _CONTRACTED.search(one.line)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2.0 * math.prod(_sizes(one.type)) * math.prod(left[axis] for axis in axes)


def _convolution(one: hlo.Instruction, left: list[int], right: list[int]) -> float:
    """Returns two operations for each pair of an element of the input and one of the kernel."""
    labels = _LABELS.search(one.line)
    assert labels, one.line
    of_input = dict(zip(labels[1], left, strict=True))
    of_kernel = dict(zip(labels[2], right, strict=True))
    of_output = dict(zip(labels[3], _sizes(one.type), strict=True))
    pairs = of_output["b"] * of_output["f"] * of_kernel["i"]
    window = _window(one.line, sum(letter.isdigit() for letter in labels[1]))
    for axis, (pad, stride, base, dilation) in enumerate(window):
        number = str(axis)
        pairs *= _taps(
            of_input[number], of_kernel[number], of_output[number], pad, stride, base, dilation
        )
    batches = re.search(r"batch_group_count=(\d+)", one.line)
    return 2.0 * pairs / (int(batches[1]) if batches else 1)


def _window(line: str, axes: int) -> list[tuple[int, int, int, int]]:
    """Returns padding before, stride, and dilation of the input and of the kernel, per axis."""
    found = _WINDOW.search(line)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}

    def numbers(name: str, otherwise: str) -> list[int]:
        text = fields.get(name, "x".join([otherwise] * axes))
        return [int(part.split("_")[0]) for part in text.split("x")] if axes else []

    values = (
        numbers("pad", "0_0"),
        numbers("stride", "1"),
        numbers("lhs_dilate", "1"),
        numbers("rhs_dilate", "1"),
    )
    return list(zip(*values, strict=True))


def _taps(
    size: int, kernel: int, output: int, pad: int, stride: int, base: int, dilation: int
) -> int:
    """Returns the pairs of an output and an element of the kernel that meet an input, on one axis.

    A product with a batch axis is a convolution along this axis whose padding and dilation leave
    one element of the kernel for each output.
    """
    reach = (size - 1) * base + 1
    if kernel == 1:
        inside = [place * stride - pad for place in range(output)]
        return sum(0 <= at < reach and at % base == 0 for at in inside)
    return sum(
        0 <= (at := place * stride - pad + tap * dilation) < reach and at % base == 0
        for place in range(output)
        for tap in range(kernel)
    )
