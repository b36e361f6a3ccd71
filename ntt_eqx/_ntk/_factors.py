"""Factors: per sample, what comes into each layer and what flows back to its output."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._layers import Layer
from ._program import Program, run


class Factors(eqx.Module):
    """Everything that the kernel of a batch of N samples and R output directions is made of.

    Attributes:
        outputs: model outputs, `[N, K]`; no batch axis for one sample under `vmap`.
        activations: for each layer `a`, `[N, G, J, S]`.
        cotangents: for each layer `d`, `[N, R, G, I, S]`.
        jacobians: for each parameter that is in no layer, its Jacobian `[N, R, *shape]`.
    """

    outputs: Float[Array, "*n classes"]
    activations: list[Array]
    cotangents: list[Array]
    jacobians: list[Array]


def factorise(
    program: Program,
    layers: list[Layer],
    rest: list[int],
    params: list[Array],
    x: Array,
    directions: Float[Array, "r classes"] | None = None,
) -> Factors:
    """Evaluate the model on `x[N, ...]` and differentiate it along output directions.

    **Arguments:**

    - `layers`, `rest`: from `find_layers`.
    - `directions`: rows are directions in output space; `None` takes the K outputs themselves.
    """
    tapped = {layer.step: layer.operand for layer in layers}
    shapes = {layer.step: program.steps[layer.step].eqn.outvars[0].aval for layer in layers}
    if directions is None:
        directions = jnp.eye(program.num_outputs, dtype=program.output_aval.dtype)
    directions = directions.astype(program.output_aval.dtype)
    zeros = {step: jnp.zeros(aval.shape, aval.dtype) for step, aval in shapes.items()}

    def one(sample: Array) -> Factors:
        def perturbed(perturbations, others):
            values = list(params)
            for p, value in zip(rest, others, strict=True):
                values[p] = value
            return run(program, values, sample, perturbations, tapped)

        others = [params[p] for p in rest]
        outputs, pull, operands = jax.vjp(perturbed, zeros, others, has_aux=True)
        d, jacobians = jax.vmap(pull)(directions)
        return Factors(
            outputs,
            [layer.activations(operands[layer.step]) for layer in layers],
            [jax.vmap(layer.cotangents)(d[layer.step]) for layer in layers],
            jacobians,
        )

    return jax.vmap(one)(x)
