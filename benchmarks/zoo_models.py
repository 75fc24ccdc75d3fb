"""The models of the zoo table: torchvision, timm and (tiny, random) Hugging Face architectures.

Nothing is downloaded: weights are random. Inputs are as small as the architecture takes them.
"""

from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import nn


class Example(NamedTuple):
    """A model and example inputs for it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


BATCH = 2

TIMM = (
    "beit_base_patch16_224 halonet26t botnet26t_256 lambda_resnet26t gernet_s repvgg_a0 resnet61q mobileone_s0 cait_xxs24_224 "
    "coat_lite_tiny convit_tiny convmixer_768_32 test_convnext convnext_atto convnextv2_atto cpubone_nano crossvit_tiny_240 csatv2 "
    "darknet17 cspresnet50 cspresnext50 cspnext_tiny davit_tiny deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 densenet121 "
    "dla34 dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mixnet_s tinynet_e efficientnet_b0 mobilenetv2_050 "
    "mnasnet_small fbnetc_100 spnasnet_100 tf_efficientnetv2_b0 efficientvim_m1 efficientvit_b0 efficientvit_m0 "
    "eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 ghostnetv2_100 "
    "ghostnetv3_050 hardcorenas_a hgnetv2_b0 hgnet_tiny hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t "
    "inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 test_mambaout "
    "coatnet_nano_rw_224 test_maxvit test_coatnet maxvit_pico_rw_256 caformer_s18 poolformer_s12 convformer_s18 gmlp_ti16_224 "
    "mixer_s32_224 resmlp_12_224 lcnet_050 mobilenetv3_small_050 fbnetv3_b mobilenetv4_conv_small_035 mobilenet_edgetpu_v2_xs "
    "mobilenetv5_base mobilevit_xxs mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small "
    "nfnet_l0 dm_nfnet_f0 nf_resnet26 eca_nfnet_l0 pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 "
    "regnety_002 regnetz_005 repghostnet_050 repvit_m0_9 res2net50_26w_4s res2next50 resnest14d resnet18 seresnet18 ecaresnet26t "
    "resnext26ts resnetrs50 test_resnet resnetv2_18 resnetv2_50x1_bit rexnet_100 selecsls42b legacy_seresnet18 sequencer2d_s "
    "shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 "
    "swinv2_cr_tiny_ns_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_svt_small twins_pcpvt_small vgg11 visformer_tiny "
    "test_vit test_vit2 test_vit3 test_vit4 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 test_vit_relpos vit_srelpos_small_patch16_224 "
    "samvit_base_patch16 vitamin_small_224 volo_d1_224 vovnet39a ese_vovnet19b_slim legacy_xception xception41 "
    "xcit_nano_12_p16_224 test_byobnet test_efficientnet test_nfnet deepseek_vit_412m"
).split()

# Left to the end of a run.
_LARGE = (
    "nasnetalarge", "pnasnet5large", "inception_resnet_v2", "deepseek_vit_412m", "mobilenetv5_base", "efficientnet_b5",
    "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_m", "efficientnet_v2_l", "densenet161", "densenet169", "densenet201",
    "regnet_x_16gf", "regnet_x_32gf", "regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32",
    "convnext_large", "convnext_base", "swin_b", "swin_v2_b", "swin_v2_s", "swin3d_b", "swin3d_s", "resnet152",
    "resnext101_64x4d", "wide_resnet101_2", "hrnet_w18_small", "samvit_base_patch16", "mvit_v2_s",
)  # fmt: skip

# Smallest image side that the architecture takes, where it is not 64.
_SIDES = (64, 96, 128, 160, 224, 240, 256, 384)


def import_torchvision() -> Any:
    """torchvision, also beside a torch without CUDA: its compiled operators are declared, never called."""
    for name in ("nms", "qnms"):
        try:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            break  # declared before, or by torchvision itself
    import torchvision

    return torchvision


def _torchvision(name: str, kind: str) -> Callable[[], Example]:
    def make() -> Example:
        models = import_torchvision().models
        if kind == "segmentation":
            side = 64
            model = models.get_model(name, weights=None, weights_backbone=None, num_classes=5)
            return Example(model, (torch.randn(BATCH, 3, side, side),), {})
        if kind == "video":
            model = models.get_model(name, weights=None, num_classes=10)
            # the positions of MViT are made for 16 frames of 224 pixels; S3D halves its 14 frames five times
            frames, side = (16, 224) if name.startswith("mvit") else (16, 112) if name == "s3d" else (8, 64)
            return Example(model, (torch.randn(BATCH, 3, frames, side, side),), {})
        more: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=None, num_classes=10, **more)
        side = 224 if name.startswith(("vit", "maxvit")) else 96 if name == "inception_v3" else 64
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
                except (TypeError, RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError) as error:
                    reasons.append(f"{side}: {error}")
        raise RuntimeError(f"no input size works: {reasons[-1]}")

    return make


def _ids(length: int = 12, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(3, vocabulary, (BATCH, length))


def _pixels(side: int = 32) -> torch.Tensor:
    return torch.randn(BATCH, 3, side, side)


def _transformers() -> Mapping[str, Callable[[], Example]]:
    """Name → maker. The sizes are the smallest that keep every kind of layer of the architecture."""

    def text(cls: str, inputs: Callable[[], dict[str, Any]] | None = None, **settings: Any) -> Callable[[], Example]:
        def make() -> Example:
            import_torchvision()
            import transformers

            architecture = getattr(transformers, cls)
            config = architecture.config_class(**settings)
            model = architecture(config)
            return Example(model, (), inputs() if inputs else {"input_ids": _ids()})

        return make

    def masked() -> dict[str, Any]:
        mask = torch.ones(BATCH, 12, dtype=torch.long)
        mask[1, 9:] = 0
        return {"input_ids": _ids(), "attention_mask": mask}

    def both() -> dict[str, Any]:
        return {"input_ids": _ids(), "decoder_input_ids": _ids(6)}

    def image(side: int = 32) -> Callable[[], dict[str, Any]]:
        return lambda: {"pixel_values": _pixels(side)}

    small = dict(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    decoder = small | dict(use_cache=False, num_key_value_heads=2)
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8)
    seq2seq = dict(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, use_cache=False,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
    )  # fmt: skip
    backbone = dict(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
    waves = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=(16, 16), conv_stride=(4, 4),
        conv_kernel=(8, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, vocab_size=32,
        mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip

    def sound() -> dict[str, Any]:
        return {"input_values": torch.randn(BATCH, 800)}

    detr = dict(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=5,
    )  # fmt: skip
    return {
        "bert": text("BertForSequenceClassification", masked, **small),
        "roberta": text("RobertaForMaskedLM", masked, **small, pad_token_id=1),
        "distilbert": text("DistilBertForSequenceClassification", masked, vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=32),
        "albert": text("AlbertForMaskedLM", masked, **small, embedding_size=16),
        "electra": text("ElectraForSequenceClassification", masked, **small, embedding_size=16),
        "deberta_v2": text("DebertaV2ForSequenceClassification", masked, **small, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        "mobilebert": text("MobileBertForSequenceClassification", masked, **small, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
        "gpt2": text("GPT2LMHeadModel", masked, vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False, bos_token_id=1, eos_token_id=2),
        "gpt_neox": text("GPTNeoXForCausalLM", **small, use_cache=False),
        "opt": text("OPTForCausalLM", masked, vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=32, use_cache=False),
        "llama_gqa": text("LlamaForCausalLM", masked, **decoder),
        "mistral": text("MistralForCausalLM", masked, **decoder, sliding_window=8),
        "qwen2": text("Qwen2ForCausalLM", masked, **decoder),
        "gemma": text("GemmaForCausalLM", **decoder, head_dim=8),
        "phi": text("PhiForCausalLM", **decoder),
        "qwen2_moe": text("Qwen2MoeForCausalLM", **decoder, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
        "mixtral": text("MixtralForCausalLM", **decoder, num_local_experts=4, num_experts_per_tok=2),
        "mamba": text("MambaForCausalLM", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, use_cache=False),
        "t5": text("T5ForConditionalGeneration", both, vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, use_cache=False),
        "bart": text("BartForConditionalGeneration", both, **seq2seq),
        "vit": text("ViTForImageClassification", image(), **vision),
        "deit": text("DeiTForImageClassification", image(), **vision),
        "beit": text("BeitForImageClassification", image(), **vision),
        "dinov2": text("Dinov2ForImageClassification", image(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8),
        "swin": text("SwinForImageClassification", image(), image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
        "swinv2": text("Swinv2ForImageClassification", image(), image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
        "segformer": text("SegformerForSemanticSegmentation", image(64), hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], decoder_hidden_size=16, num_attention_heads=[1, 2, 4, 8]),
        "convnext": text("ConvNextForImageClassification", image(64), hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
        "convnextv2": text("ConvNextV2ForImageClassification", image(64), hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
        "resnet": text("ResNetForImageClassification", image(64), **backbone),
        "regnet": text("RegNetForImageClassification", image(64), **backbone, groups_width=4),
        "mobilenet_v1": text("MobileNetV1ForImageClassification", image(64), depth_multiplier=0.25),
        "mobilenet_v2": text("MobileNetV2ForImageClassification", image(64), depth_multiplier=0.25),
        "mobilevit": text("MobileViTForImageClassification", image(64), hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 32], num_attention_heads=4, image_size=64),
        "poolformer": text("PoolFormerForImageClassification", image(64), hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
        "levit": text("LevitForImageClassification", image(64), image_size=64, hidden_sizes=[16, 32, 48], num_attention_heads=[2, 2, 4], depths=[1, 1, 1], key_dim=[8, 8, 8]),
        "yolos": text("YolosForObjectDetection", image(), **(vision | dict(image_size=[32, 32])), num_detection_tokens=5),
        "detr": text("DetrForObjectDetection", image(64), **detr),
        "clip_vision": text("CLIPVisionModel", image(), **vision),
        "wav2vec2": text("Wav2Vec2ForCTC", sound, **waves),
        "hubert": text("HubertForCTC", sound, **waves),
        "whisper": text("WhisperForConditionalGeneration", lambda: {"input_features": torch.randn(BATCH, 16, 64), "decoder_input_ids": _ids(6)}, **(seq2seq | dict(max_source_positions=32, max_target_positions=16, num_mel_bins=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1))),
    }  # fmt: skip


def zoo() -> dict[str, Callable[[], Example]]:
    """Every model by name (``timm/resnet18``) with a maker of model and example inputs."""
    models = import_torchvision().models
    entries = {f"transformers/{name}": make for name, make in _transformers().items()}
    vision: dict[str, Callable[[], Example]] = {}
    for kind, module in (("video", models.video), ("segmentation", models.segmentation), ("classification", models)):
        vision |= {f"torchvision/{name}": _torchvision(name, kind) for name in models.list_models(module=module)}
    for timm_name, vision_name in zip_longest(TIMM, vision):
        if vision_name:
            entries[vision_name] = vision[vision_name]
        if timm_name:
            entries[f"timm/{timm_name}"] = _timm(timm_name)
    return dict(sorted(entries.items(), key=lambda entry: entry[0].endswith(_LARGE)))
