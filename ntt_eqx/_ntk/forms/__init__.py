"""The forms in which a parameter can enter the kernel: one class a file, and the choice."""

from ._choose import plan_layer as plan_layer
from ._form import (
    AbstractForm as AbstractForm,
    Cost as Cost,
    Path as Path,
    Sizes as Sizes,
)
from ._gathered import GatheredForm as GatheredForm
from ._jacobian import JacobianForm as JacobianForm
from ._layer import (
    AbstractGatheredForm as AbstractGatheredForm,
    AbstractLayerForm as AbstractLayerForm,
)
