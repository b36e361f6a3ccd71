"""Models that tests of several rooms share."""

import equinox as eqx
import jax


class Dropping(eqx.Module):
    """Two dense layers with an activation and dropout between them; the key is optional."""

    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    second: eqx.nn.Linear
    activation: str = eqx.field(static=True)

    def __init__(self, sizes, key, *, activation="relu", dtype=None):
        one, two = jax.random.split(key)
        inputs, hidden, outputs = sizes
        self.first = eqx.nn.Linear(inputs, hidden, key=one, dtype=dtype)
        self.dropout = eqx.nn.Dropout(0.5)
        self.second = eqx.nn.Linear(hidden, outputs, key=two, dtype=dtype)
        self.activation = activation

    def __call__(self, x, *, key=None):
        h = getattr(jax.nn, self.activation)(self.first(x))
        return self.second(self.dropout(h, key=key))
