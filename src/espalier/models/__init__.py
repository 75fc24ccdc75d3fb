"""The architectures of the papers' experiments: plain modules with no hint to the library."""

from espalier.models.demonet import DemoNet as DemoNet
