"""The architectures of the papers' experiments: plain modules with no hint to the library."""

from espalier.models.darts import DARTS as DARTS
from espalier.models.demonet import DemoNet as DemoNet
from espalier.models.mobile import MobileNet as MobileNet
from espalier.models.mobilenet_v1 import MobileNetV1 as MobileNetV1
from espalier.models.nas_bench_201 import NASBench201 as NASBench201
from espalier.models.regnet import RegNetX as RegNetX
from espalier.models.regnet import regnet_x_200m as regnet_x_200m
from espalier.models.regnet import regnet_x_400m as regnet_x_400m
from espalier.models.regnet import regnet_x_600m as regnet_x_600m
from espalier.models.regnet import regnet_x_800m as regnet_x_800m
from espalier.models.stacked_unets import StackedUnets as StackedUnets
from espalier.models.super_resnet import SuperResNet as SuperResNet
