"""`ntt-eqx transfer`."""

import dataclasses
from pathlib import Path

from ..methods import TransferName
from ._options import NetworkOptions, make_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer(NetworkOptions):
    """Find a sparse network by Neural Tangent Transfer, without labels.

    Writes the network to OUT/model.eqx; `ntt-eqx train --start OUT` trains it.
    """

    method: TransferName = "ntt"
    out: Path = Path("runs/transfer")

    def make(self) -> int:
        """Find the network; returns the exit status."""
        return make_one(dataclasses.replace(self.cell(), training=None), self)
