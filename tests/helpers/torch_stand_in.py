"""The little of torch that the guide's code uses, for where torch is not installed."""

import types

import numpy as np


class Tensor:
    """No array of numpy or of JAX, but readable as one."""

    def __init__(self, values):
        self._values = np.asarray(values)
        self.shape = self._values.shape

    def __array__(self, dtype=None, copy=None):
        return self._values if dtype is None else self._values.astype(dtype)

    def __getitem__(self, index):
        return Tensor(self._values[index])

    def numpy(self):
        return self._values


class TensorDataset:
    def __init__(self, *tensors):
        self.tensors = tensors


class DataLoader:
    """Batches are lists of tensors, in another order at each pass."""

    def __init__(self, dataset, batch_size, shuffle, drop_last):
        assert shuffle and drop_last
        self._tensors, self._size = dataset.tensors, batch_size
        self._rng = np.random.default_rng(0)

    def __iter__(self):
        order = self._rng.permutation(self._tensors[0].shape[0])
        for start in range(0, len(order) - self._size + 1, self._size):
            yield [tensor[order[start : start + self._size]] for tensor in self._tensors]


from_numpy = Tensor
utils = types.SimpleNamespace(
    data=types.SimpleNamespace(TensorDataset=TensorDataset, DataLoader=DataLoader)
)
