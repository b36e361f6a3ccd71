"""The commands of `ntt-eqx`, one file each: options as a typed dataclass, and what they do."""

from .compare import Compare as Compare
from .data import Data as Data
from .evaluate import Evaluate as Evaluate
from .evolution import Evolution as Evolution
from .export import Export as Export
from .inspect import Inspect as Inspect
from .report import Report as Report
from .runs import Runs as Runs
from .train import Train as Train
from .transfer import Transfer as Transfer

_KINDS = (Compare, Transfer, Train, Evaluate, Inspect, Export, Evolution, Data, Runs, Report)
COMMANDS: dict[str, type] = {kind.__name__.lower(): kind for kind in _KINDS}
