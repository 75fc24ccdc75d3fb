"""A representative third of docs/results/zoo.md: trace exact in both modes, and construct exact."""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

for library in ("timm", "transformers", "torchvision"):
    if find_spec(library) is None:  # not imported here: torchvision needs its operators declared before
        pytest.skip(f"{library} is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from zoo import check  # noqa: E402
from zoo_models import zoo  # noqa: E402
from zoo_table import verdict  # noqa: E402

# Small and fast ones, of as many kinds as possible.
NAMES = (
    "transformers/bert",
    "transformers/distilbert",
    "transformers/gpt2",
    "transformers/llama_gqa",
    "transformers/qwen2_moe",
    "transformers/t5",
    "transformers/vit",
    "transformers/swin",
    "transformers/segformer",
    "transformers/convnext",
    "transformers/resnet",
    "transformers/mobilenet_v2",
    "transformers/yolos",
    "transformers/wav2vec2",
    "transformers/whisper",
    "transformers/levit",
    "torchvision/alexnet",
    "torchvision/resnet18",
    "torchvision/squeezenet1_1",
    "torchvision/mnasnet0_5",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/mobilenet_v3_small",
    "torchvision/regnet_y_400mf",
    "torchvision/convnext_tiny",
    "torchvision/vit_b_32",
    "torchvision/vgg11_bn",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/efficientnet_b0",
    "torchvision/mobilenet_v2",
    "timm/test_byobnet",
    "timm/test_convnext",
    "timm/test_efficientnet",
    "timm/test_mambaout",
    "timm/test_maxvit",
    "timm/test_coatnet",
    "timm/test_nfnet",
    "timm/test_resnet",
    "timm/test_vit",
    "timm/test_vit2",
    "timm/test_vit3",
    "timm/test_vit_relpos",
    "timm/lcnet_050",
    "timm/mobilenetv3_small_050",
    "timm/regnetx_002",
    "timm/resnet18",
    "timm/tinynet_e",
    "timm/levit_128s",
    "timm/starnet_s050",
    "timm/mixer_s32_224",
    "timm/repvgg_a0",
    "timm/dla34",
    "timm/ghostnet_050",
    "timm/fasternet_t0",
    "timm/poolformer_s12",
    "timm/deit_tiny_patch16_224",
    "timm/res2next50",
)


@pytest.mark.parametrize("name", NAMES)
def test_zoo(name: str):
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = check(zoo()[name])
    torch.random.set_rng_state(state)
    assert verdict(record) == "", record
    assert record["eval"] == record["train"] == 0.0
    assert not record["notes"]
