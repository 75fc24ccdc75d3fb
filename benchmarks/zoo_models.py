"""The models of the zoo table: torchvision, timm and (tiny, random) Hugging Face architectures.

Nothing is downloaded: weights are random. Inputs are as small as the architecture takes them.
"""

from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from zoo_example import BATCH, Example, import_torchvision
from zoo_transformers import transformers_models

TIMM = (Path(__file__).parent / "zoo_timm.txt").read_text().split()

# Left to the end of a run.
_LARGE = (
    "cait_xxs24_224",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "crossvit_tiny_240",
    "deeplabv3_resnet101",
    "deepseek_vit_412m",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "dpn48b",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_v2_l",
    "efficientnet_v2_m",
    "fcn_resnet101",
    "fcn_resnet50",
    "halonet26t",
    "hrnet_w18_small",
    "inception_resnet_v2",
    "inception_v4",
    "maxvit_t",
    "mnasnet0_75",
    "mnasnet1_0",
    "mnasnet1_3",
    "mobilenet_v3_large",
    "mobilenetv5_base",
    "mvit_v1_b",
    "mvit_v2_s",
    "nasnetalarge",
    "pnasnet5large",
    "r2plus1d_18",
    "r3d_18",
    "regnet_x_16gf",
    "regnet_x_1_6gf",
    "regnet_x_32gf",
    "regnet_x_3_2gf",
    "regnet_x_800mf",
    "regnet_x_8gf",
    "regnet_y_128gf",
    "regnet_y_16gf",
    "regnet_y_1_6gf",
    "regnet_y_32gf",
    "regnet_y_3_2gf",
    "regnet_y_800mf",
    "regnet_y_8gf",
    "resnet101",
    "resnet152",
    "resnet34",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext50_32x4d",
    "s3d",
    "samvit_base_patch16",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "squeezenet1_0",
    "swin3d_b",
    "swin3d_s",
    "swin3d_t",
    "swin_b",
    "swin_s",
    "swin_v2_b",
    "swin_v2_s",
    "swin_v2_t",
    "vgg11",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "vit_b_16",
    "vit_h_14",
    "vit_l_16",
    "vit_l_32",
    "wide_resnet101_2",
    "wide_resnet50_2",
)

# Smallest image side that the architecture takes, where it is not 64.
_SIDES = (64, 96, 128, 160, 224, 240, 256, 384)


def _torchvision(name: str, kind: str) -> Callable[[], Example]:
    def make() -> Example:
        models = import_torchvision().models
        if kind == "segmentation":
            side = 64
            model = models.get_model(name, weights=None, weights_backbone=None, num_classes=5)
            return Example(model, (torch.randn(BATCH, 3, side, side),), {})
        if kind == "video":
            model = models.get_model(name, weights=None, num_classes=10)
            # the positions of MViT are made for 16 frames of 224 pixels; S3D ends with a pool of 2 by 7 by 7
            frames, side = (16, 224) if name.startswith("mvit") or name == "s3d" else (8, 64)
            return Example(model, (torch.randn(BATCH, 3, frames, side, side),), {})
        more: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=None, num_classes=10, **more)
        side = 224 if name.startswith(("vit", "maxvit")) else 299 if name == "inception_v3" else 64
        return Example(model, (torch.randn(BATCH, 3, side, side),), {})

    return make


def _timm(name: str) -> Callable[[], Example]:
    def make() -> Example:
        import_torchvision()
        import timm

        reasons: list[str] = []
        for side in _SIDES:
            for more in ({"img_size": side}, {}):
                try:
                    model = timm.create_model(name, pretrained=False, num_classes=10, **more)
                    x = torch.randn(BATCH, 3, side, side)
                    with torch.no_grad():
                        model.eval()(x)
                        return Example(model.train(), (x,), {})
                except (
                    TypeError,
                    RuntimeError,
                    ValueError,
                    AssertionError,
                    IndexError,
                    ZeroDivisionError,
                ) as error:
                    reasons.append(f"{side}: {error}")
        raise RuntimeError(f"no input size works: {reasons[-1]}")

    return make


def zoo() -> dict[str, Callable[[], Example]]:
    """Every model by name (``timm/resnet18``) with a maker of model and example inputs."""
    models = import_torchvision().models
    entries = {f"transformers/{name}": make for name, make in transformers_models().items()}
    vision: dict[str, Callable[[], Example]] = {}
    for kind, module in (
        ("classification", models),
        ("segmentation", models.segmentation),
        ("video", models.video),
    ):
        vision |= {f"torchvision/{name}": _torchvision(name, kind) for name in models.list_models(module=module)}
    for timm_name, vision_name in zip_longest(TIMM, vision):
        if vision_name:
            entries[vision_name] = vision[vision_name]
        if timm_name:
            entries[f"timm/{timm_name}"] = _timm(timm_name)
    return dict(sorted(entries.items(), key=lambda entry: entry[0].endswith(_LARGE)))
