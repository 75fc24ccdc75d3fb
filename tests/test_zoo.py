"""A representative third of docs/results/zoo.md: trace exact in both modes, and construct exact."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from zoo import check
from zoo_models import zoo
from zoo_table import verdict

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
    "torchvision/efficientnet_b0",
    "torchvision/mobilenet_v2",
    "torchvision/resnet50",
    "torchvision/regnet_x_400mf",
    "timm/test_byobnet",
    "timm/test_convnext",
    "timm/test_efficientnet",
    "timm/test_mambaout",
    "timm/tinynet_e",
    "timm/repvgg_a0",
    "timm/dla34",
    "timm/ghostnet_050",
    "timm/fasternet_t0",
    "timm/deit_tiny_patch16_224",
    "timm/efficientvit_b0",
    "timm/efficientvim_m1",
    "timm/convit_tiny",
    "timm/cspnext_tiny",
    "timm/edgenext_xx_small",
    "timm/deit_tiny_distilled_patch16_224",
    "timm/mnasnet_small",
    "timm/coat_lite_tiny",
    "timm/gcvit_xxtiny",
    "timm/convnext_atto",
    "timm/mobilenetv2_050",
    "timm/eva02_tiny_patch14_224",
    "timm/cspresnet50",
    "timm/cspresnext50",
    "timm/lambda_resnet26t",
    "timm/convnextv2_atto",
    "timm/cpubone_nano",
    "timm/botnet26t_256",
    "timm/efficientnet_b0",
    "timm/efficientformerv2_s0",
    "timm/efficientformer_l1",
    "timm/darknet17",
    "timm/convformer_s18",
    "timm/ecaresnet26t",
    "timm/ese_vovnet19b_slim",
    "timm/gmlp_ti16_224",
    "timm/lcnet_050",
    "timm/legacy_seresnet18",
    "timm/lowformer_b0",
    "timm/mixer_s32_224",
    "timm/mobilevit_xxs",
    "timm/mobilevitv2_050",
    "timm/nest_tiny",
    "timm/pit_ti_224",
    "timm/poolformer_s12",
    "timm/pvt_v2_b0",
    "timm/regnetx_002",
    "timm/regnety_002",
    "timm/regnetz_005",
    "timm/repghostnet_050",
    "timm/repvit_m0_9",
    "timm/res2net50_26w_4s",
    "timm/resmlp_12_224",
    "timm/resnest14d",
    "timm/resnext26ts",
    "timm/selecsls42b",
    "timm/seresnet18",
    "timm/shvit_s1",
    "timm/skresnet18",
    "timm/starnet_s050",
    "timm/swiftformer_xs",
    "timm/swinv2_cr_tiny_ns_224",
    "timm/visformer_tiny",
    "timm/vovnet39a",
    "transformers/albert",
    "transformers/bart",
    "transformers/beit",
    "transformers/dinov2",
    "transformers/mistral",
    "transformers/opt",
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
