import jax
import jax.numpy as jnp

from moe_jax.planning import flops

# A product (4, 8) x (8, 16) before a loop of 3 rounds, each with a batch of 2 products (3, 4) x
# (4, 5), which a TPU writes as a convolution along the batch axis, and with two kernels.
PROGRAM = """HloModule step

%body (p: (f32[2,3,4], f32[2,4,5])) -> (f32[2,3,4], f32[2,4,5]) {
  %p = (f32[2,3,4], f32[2,4,5]) parameter(0)
  %x = f32[2,3,4]{2,1,0} get-tuple-element(%p), index=0
  %w = f32[2,4,5]{2,1,0} get-tuple-element(%p), index=1
  %y = f32[2,3,5]{2,1,0} convolution(%x, %w), window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf
  %gmm.1 = f32[3,5]{1,0} custom-call(%y), custom_call_target="tpu_custom_call", ESTIMATE
  %splash_fwd.12 = f32[3,5]{1,0} custom-call(%y), custom_call_target="tpu_custom_call"
  %sort = f32[3,5]{1,0} custom-call(%y), custom_call_target="Sharding"
  ROOT %next = (f32[2,3,4], f32[2,4,5]) tuple(%x, %w)
}

%condition (p: (f32[2,3,4], f32[2,4,5])) -> pred[] {
  %p = (f32[2,3,4], f32[2,4,5]) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (a: f32[4,8], b: f32[8,16], c: (f32[2,3,4], f32[2,4,5])) -> f32[4,16] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  %c = (f32[2,3,4], f32[2,4,5]) parameter(2)
  %loop = (f32[2,3,4], f32[2,4,5]) while(%c), condition=%condition, body=%body, ROUNDS
  ROOT %d = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
ESTIMATE = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"100"}}}'
ROUNDS = 'backend_config={"known_trip_count":{"n":"3"}}'


def test_products_and_kernels_count_once_per_execution():
    counted = flops.count(PROGRAM.replace("ESTIMATE", ESTIMATE).replace("ROUNDS", ROUNDS))
    # A multiplication and an addition for each of 4 x 8 x 16, and three times for 2 x 3 x 4 x 5.
    assert counted.products == 2 * 4 * 8 * 16 + 3 * 2 * 2 * 3 * 4 * 5
    assert counted.kernels == 3 * 100
    assert counted.without_estimate == {"splash_fwd": 3}


def test_a_loop_compiled_here_counts_all_its_rounds():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    x, weights = jnp.ones((32, 64)), jnp.ones((5, 64, 64))
    text = jax.jit(layers).lower(x, weights).compile().as_text()
    assert flops.count(text).products == 5 * 2 * 32 * 64 * 64
