"""The non-zeros of a metric, gathered row by row into short chunks of one width.

A row of the mask of a pruned layer holds few and unequally many non-zeros. Cut into chunks of
`WIDTH`, any mask with P non-zeros in I rows fits P // WIDTH + I chunks: the shapes depend on the
number of non-zeros alone, so that another mask with as many compiles nothing again, and the work
falls with the density however unequal the rows are.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Chunks of 8, 16 and 32 are within a fifth of each other on CPU at densities from 1 to 10 %.
WIDTH = 16


class GatheredMetric(eqx.Module):
    """A metric `c[I, J]` of which only the non-zeros are stored.

    Attributes:
        rows: the row of each chunk, ascending; I for a chunk that is not in use.
        columns: the columns of its entries.
        values: their values; 0 where an entry is not in use.
        offset: what is added to `u[n,m,i]`: the metric of a bias, or 0.
        shape: (I, J).
    """

    rows: Int[Array, " chunks"]
    columns: Int[Array, "chunks width"]
    values: Float[Array, "chunks width"]
    offset: Float[Array, " i"]
    shape: tuple[int, int] = eqx.field(static=True)


def gathered_entries(nonzeros: int, rows: int) -> int:
    """Entries that `gather_rows` stores, those that are not in use included.

    **Arguments:**

    - `nonzeros`, `rows`: how many of each the metric has.

    **Returns:**

    A multiple of the width of a chunk.
    """
    return (nonzeros // WIDTH + rows) * WIDTH


def gather_rows(
    indices: Int[Array, " nonzeros"],
    metric: Bool[Array, "i j"] | Float[Array, "i j"],
    offset: Float[Array, " i"],
) -> GatheredMetric:
    """Gather the entries of `metric` at some flat indices.

    **Arguments:**

    - `indices`: ascending flat indices into `metric` that cover all its non-zeros; I J (one
      past the end) fills up an array that is longer than needed.
    - `metric`: the metric `c[I, J]`, zero at all other indices.
    - `offset`: see `GatheredMetric`; its dtype becomes that of the values.

    **Returns:**

    A `GatheredMetric`, whose shapes depend on the number of indices alone.
    """
    shape = (metric.shape[0], metric.shape[1])
    size, count = metric.size, len(indices)
    row, column = indices // shape[1], indices % shape[1]
    per_row = jax.ops.segment_sum(jnp.ones_like(row), row, shape[0] + 1, indices_are_sorted=True)
    first = jnp.cumsum(per_row) - per_row  # place of each row's first entry
    chunks = -(-per_row // WIDTH)
    first_chunk = jnp.cumsum(chunks) - chunks
    place = jnp.arange(count, dtype=row.dtype) - first[row]
    chunk, slot = first_chunk[row] + place // WIDTH, place % WIDTH
    total = gathered_entries(count, shape[0]) // WIDTH
    value = metric.reshape(-1)[jnp.minimum(indices, size - 1)].astype(offset.dtype)
    value = jnp.where(indices < size, value, jnp.zeros_like(value))
    put = lambda fill, x: fill.at[chunk, slot].set(x, mode="drop")
    return GatheredMetric(
        jnp.full(total, shape[0], row.dtype).at[chunk].set(row, mode="drop"),
        put(jnp.zeros((total, WIDTH), row.dtype), jnp.where(indices < size, column, 0)),
        put(jnp.zeros((total, WIDTH), offset.dtype), value),
        offset,
        shape,
    )


def gathered_u(
    a1: Float[Array, "n j"], a2: Float[Array, "m j"], c: GatheredMetric
) -> Float[Array, "n m i"]:
    """`u[n,m,i] = sum_j c[i,j] a1[n,j] a2[m,j] + offset[i]`: one small matrix product a chunk."""
    left = _take(a1.T, c.columns) * c.values[:, :, None]  # [chunks, width, N]
    right = _take(a2.T, c.columns)
    parts = jnp.einsum("cwn,cwm->cnm", left, right)
    u = jax.ops.segment_sum(parts, c.rows, c.shape[0], indices_are_sorted=True)
    return u.transpose(1, 2, 0) + c.offset[None, None]


def gathered_tangents(
    a: Float[Array, "j s"], d: Float[Array, "k i s"], c: GatheredMetric
) -> Float[Array, "k entries"]:
    """`T[k,i,j] = sum_s d[k,i,s] a[j,s]` of one sample where `c` has entries, chunk by chunk.

    **Arguments:**

    - `a`: what comes into the layer at each position s.
    - `d`: what flows back to its output, along each of k directions.
    - `c`: the metric, gathered.

    **Returns:**

    `[k, chunks * width]`, in the order of `c.values.reshape(-1)`; where an entry is not in use, any
    number of the products' size.
    """
    rows = jnp.minimum(c.rows, d.shape[1] - 1)
    parts = jnp.einsum("cks,cws->ckw", _take(d.swapaxes(0, 1), rows), _take(a, c.columns))
    return parts.swapaxes(0, 1).reshape(len(d), -1)


def gathered_u_backward(
    u_bar: Float[Array, "n m i"],
    a1: Float[Array, "n j"],
    a2: Float[Array, "m j"],
    c: GatheredMetric,
) -> tuple[Float[Array, "n j"], Float[Array, "m j"]]:
    """The cotangents of `a1` and `a2` in `gathered_u`.

    dL/da1[n,j] = sum_mi dL/du[n,m,i] c[i,j] a2[m,j], and the same with the sides exchanged.
    """
    parts = u_bar.transpose(2, 0, 1).at[c.rows].get(mode="fill", fill_value=0)  # [chunks, N, M]

    def one(spec, other, like):
        entries = jnp.einsum(spec, parts, _take(other.T, c.columns) * c.values[:, :, None])
        return jnp.zeros_like(like.T).at[c.columns].add(entries).T

    return one("cnm,cwm->cwn", a2, a1), one("cnm,cwn->cwm", a1, a2)


def entries_of(a: Float[Array, "n j"], c: GatheredMetric) -> Float[Array, "chunks width n"]:
    """`a[n, j]` at the column of every entry."""
    return _take(a.T, c.columns)


def row_starts(c: GatheredMetric) -> Int[Array, " rows_and_one"]:
    """The first chunk of every row, and one past the last: the chunks of a row are side by side."""
    rows = jnp.arange(c.shape[0] + 1, dtype=c.rows.dtype)
    found = jnp.searchsorted(c.rows, rows, method="scan_unrolled")
    return found.astype(jnp.int32)


def sum_columns(
    entries: Float[Array, "chunks width n"], c: GatheredMetric, columns: int
) -> Float[Array, "n j"]:
    """The sums over all entries of one column."""
    zeros = jnp.zeros((columns, entries.shape[2]), entries.dtype)
    return zeros.at[c.columns].add(entries).T


def _take(x, places):
    """Rows of `x`; all places are inside, which spares XLA a pass over the result."""
    return x.at[places].get(mode="promise_in_bounds")
