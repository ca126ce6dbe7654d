from moe_jax.planning.compile import (
    Buffer,
    largest_allocations,
    out_of_memory,
    refused,
    total_bytes,
)

# Excerpts of what XLA prints.
MESSAGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(23.65G) exceeds available HBM (15.75G)."
)
OTHER = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 172.00G of 95.74G hbm. Exceeded hbm capacity by 76.26G."
)
REPORT = """Memory Space: default (color=0)
Total bytes: 25392516608 (23.65GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    1.69GiB( 10%);    1.69GiB;   7266811904;   19; bf16[16,114], f32[512,12], 10×f32[6,32,3072,768]
    2.53GiB( 20%);  864.00MiB;   9078751232;   10; 10×f32[6,16,3072,768]
    2.54GiB( 20%);     512B;   9078751232;   2; s32[], f32[128]

Memory Space: vmem (color=1)
Total bytes: 117440512 (112.00MiB)
"""


def test_both_messages_are_read():
    found = out_of_memory(MESSAGE)
    assert (found.error, found.peak, found.limit) == (MESSAGE, 0, round(15.75 * 2**30))
    assert found.temporaries == round(23.65 * 2**30)
    other = out_of_memory(OTHER)
    assert (other.peak, other.limit) == (172 * 2**30, round(95.74 * 2**30))


def test_the_report_names_the_largest_buffers():
    assert total_bytes(REPORT) == 25392516608
    assert largest_allocations(REPORT, 2) == (
        Buffer(round(1.69 * 2**30), "f32[6,32,3072,768]"),
        Buffer(864 * 2**20, "f32[6,16,3072,768]"),
    )
    assert largest_allocations("") == ()


def test_a_refusal_is_one_line_with_the_reason_of_the_compiler():
    found = str(refused("INTERNAL: RET_CHECK failure (emitter.cc:325) !limited\nstack"))
    assert "INTERNAL: RET_CHECK failure (emitter.cc:325) !limited;" in found
    assert "\n" not in found and "exchange" in found
