"""A part of docs/results/zoo_channels.md: half of the channels and heads gone, exact."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from zoo_channels import check, half_of_every_family, verdict
from zoo_models import zoo

import espalier

# Small ones, of as many kinds as possible, and whether they stay in their own class.
NAMES = {
    "transformers/bert": True,
    "transformers/gpt2": True,
    "transformers/llama_gqa": True,
    "transformers/qwen2_moe": False,
    "transformers/t5": False,
    "transformers/vit": True,
    "transformers/swin": False,
    "transformers/segformer": False,
    "transformers/convnextv2": True,
    "torchvision/alexnet": True,
    "torchvision/resnet18": True,
    "torchvision/shufflenet_v2_x0_5": True,
    "torchvision/mobilenet_v3_small": True,
    "torchvision/regnet_y_400mf": True,
    "timm/test_byobnet": True,
    "timm/test_convnext": True,
    "timm/test_efficientnet": True,
    "timm/ghostnet_050": True,
    "timm/deit_tiny_patch16_224": True,
    "timm/mixer_s32_224": True,
}


@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_channels(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = check(zoo()[name])
    assert verdict(record) == ""
    assert record["share"] < 0.75
    if NAMES[name]:
        assert record["own_class"]


def test_a_pruned_language_model_generates() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, args, kwargs = zoo()["transformers/llama_gqa"]()
        space = espalier.search_space(model.eval(), args, kwargs, levels=("channel", "head"))
        small = espalier.construct(space, half_of_every_family(space))
    tokens = small.generate(kwargs["input_ids"], max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert tokens.shape == (2, kwargs["input_ids"].shape[1] + 4)
    with torch.no_grad():
        again = small(input_ids=tokens[:, :-1]).logits[:, -1].argmax(-1)
    assert torch.equal(again, tokens[:, -1])
