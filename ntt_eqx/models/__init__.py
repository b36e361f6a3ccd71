"""Architectures for one sample, `x[C, H, W] -> logits[K]`, with the published initialisation."""

from ._conv4 import Conv4 as Conv4
from ._init import glorot_init as glorot_init
from ._lenet import LeNet5 as LeNet5, LeNet300100 as LeNet300100
from ._registry import MODELS as MODELS, make_model as make_model
