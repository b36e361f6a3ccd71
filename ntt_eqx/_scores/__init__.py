"""Scores of prunable weights: the higher, the more a weight is worth keeping."""

from ._base import (
    AbstractDrawingScore as AbstractDrawingScore,
    AbstractLabelFreeScore as AbstractLabelFreeScore,
    AbstractSupervisedScore as AbstractSupervisedScore,
    mask_derivative as mask_derivative,
    read_examples as read_examples,
    read_inputs as read_inputs,
    split_weights as split_weights,
)
from ._grasp import GraSP as GraSP
from ._lamp import LAMP as LAMP
from ._logit_snip import LogitSnip as LogitSnip
from ._loss_gradient import LossGradient as LossGradient
from ._magnitude import Magnitude as Magnitude
from ._ntk_sap import NTKSAP as NTKSAP
from ._path_exclusion import PathExclusion as PathExclusion
from ._prune import prune as prune
from ._random import Random as Random
from ._snip import Snip as Snip
from ._synflow import SynFlow as SynFlow
from ._wanda import Wanda as Wanda
from ._weighted_random import WeightedRandom as WeightedRandom
