"""Scores of prunable weights: the higher, the more a weight is worth keeping."""

from ._base import LabelFreeScore as LabelFreeScore, SupervisedScore as SupervisedScore
from ._logit_snip import LogitSnip as LogitSnip
from ._magnitude import Magnitude as Magnitude
from ._random import Random as Random
from ._snip import Snip as Snip
