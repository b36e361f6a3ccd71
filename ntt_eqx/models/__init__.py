"""Architectures for one sample, `x[C, H, W] -> logits[K]`, with published initialisations."""

from ._conv4 import Conv4 as Conv4
from ._conv6 import Conv6 as Conv6
from ._init import glorot_init as glorot_init, he_init as he_init
from ._lenet import LeNet5 as LeNet5, LeNet300100 as LeNet300100
from ._perceptron import Perceptron as Perceptron
from ._registry import MODELS as MODELS, make_model as make_model
from ._resnet import ResNet18 as ResNet18, ResNet20 as ResNet20, ResNet32 as ResNet32
from ._vgg import VGG11 as VGG11, VGG16 as VGG16, VGG19 as VGG19
from ._vit import ViT as ViT
