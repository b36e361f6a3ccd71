"""Neural Tangent Transfer: losses, probes, the method they make, its state and steps."""

from ._config import NTTConfig as NTTConfig
from ._distances import (
    AbstractDistance as AbstractDistance,
    Alignment as Alignment,
    MeanSquare as MeanSquare,
)
from ._given import PatternWarning as PatternWarning
from ._init import ntt_init as ntt_init
from ._kernels import (
    OutputsAndKernels as OutputsAndKernels,
    outputs_and_kernels as outputs_and_kernels,
)
from ._loss import (
    AbstractTransferLoss as AbstractTransferLoss,
    l2_penalty as l2_penalty,
)
from ._matching import KernelMatching as KernelMatching
from ._method import NeuralTangentTransfer as NeuralTangentTransfer
from ._ntt_loss import NTTMetrics as NTTMetrics, ntt_loss as ntt_loss
from ._probes import (
    AbstractProbe as AbstractProbe,
    Diagonal as Diagonal,
    Full as Full,
    Sketch as Sketch,
    Trace as Trace,
)
from ._run import transfer as transfer
from ._state import NTTState as NTTState
from ._step import ntt_evaluate as ntt_evaluate, ntt_step as ntt_step
from ._view import RefreshView as RefreshView
