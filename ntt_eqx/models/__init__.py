"""Architectures for one sample, `x[C, H, W] -> logits[K]`, with the published initialisation."""

from ._conv4 import Conv4 as Conv4
from ._init import glorot_init as glorot_init
from ._lenet import LeNet5 as LeNet5, LeNet300100 as LeNet300100
from ._registry import MODELS as MODELS, make_model as make_model
from ._resnet import ResNet20 as ResNet20
from ._vgg import VGG11 as VGG11
from ._vit import ViT as ViT
