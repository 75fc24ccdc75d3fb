"""Hugging Face architectures, tiny and random: the smallest that keep every kind of layer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from zoo_example import BATCH, Example, import_torchvision


def _ids(length: int = 12, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(3, vocabulary, (BATCH, length))


def _pixels(side: int = 32) -> torch.Tensor:
    return torch.randn(BATCH, 3, side, side)


def transformers_models() -> Mapping[str, Callable[[], Example]]:
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

    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
    }
    decoder = small | {"use_cache": False, "num_key_value_heads": 2}
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
    }
    seq2seq = {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "use_cache": False,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 32,
    }
    backbone = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
    waves = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "conv_dim": (16, 16),
        "conv_stride": (4, 4),
        "conv_kernel": (8, 4),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "vocab_size": 32,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
    }

    def sound() -> dict[str, Any]:
        return {"input_values": torch.randn(BATCH, 800)}

    detr = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_queries": 5,
    }
    return {
        "bert": text("BertForSequenceClassification", masked, **small),
        "roberta": text("RobertaForMaskedLM", masked, **small, pad_token_id=1),
        "distilbert": text(
            "DistilBertForSequenceClassification",
            masked,
            vocab_size=64,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=32,
        ),
        "albert": text("AlbertForMaskedLM", masked, **small, embedding_size=16),
        "electra": text("ElectraForSequenceClassification", masked, **small, embedding_size=16),
        "deberta_v2": text(
            "DebertaV2ForSequenceClassification",
            masked,
            **small,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
        ),
        "mobilebert": text(
            "MobileBertForSequenceClassification",
            masked,
            **small,
            embedding_size=16,
            intra_bottleneck_size=16,
            true_hidden_size=16,
        ),
        "gpt2": text(
            "GPT2LMHeadModel",
            masked,
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "gpt_neox": text("GPTNeoXForCausalLM", **small, use_cache=False),
        "opt": text(
            "OPTForCausalLM",
            masked,
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            ffn_dim=48,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
            use_cache=False,
        ),
        "llama_gqa": text("LlamaForCausalLM", masked, **decoder),
        "mistral": text("MistralForCausalLM", masked, **decoder, sliding_window=8),
        "qwen2": text("Qwen2ForCausalLM", masked, **decoder),
        "gemma": text("GemmaForCausalLM", **decoder, head_dim=8),
        "phi": text("PhiForCausalLM", **decoder),
        "qwen2_moe": text(
            "Qwen2MoeForCausalLM",
            **decoder,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        "mixtral": text("MixtralForCausalLM", **decoder, num_local_experts=4, num_experts_per_tok=2),
        "mamba": text(
            "MambaForCausalLM",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            use_cache=False,
        ),
        "t5": text(
            "T5ForConditionalGeneration",
            both,
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            use_cache=False,
        ),
        "bart": text("BartForConditionalGeneration", both, **seq2seq),
        "vit": text("ViTForImageClassification", image(), **vision),
        "deit": text("DeiTForImageClassification", image(), **vision),
        "beit": text("BeitForImageClassification", image(), **vision),
        "dinov2": text(
            "Dinov2ForImageClassification",
            image(),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        "swin": text(
            "SwinForImageClassification",
            image(),
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        "swinv2": text(
            "Swinv2ForImageClassification",
            image(),
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        "segformer": text(
            "SegformerForSemanticSegmentation",
            image(64),
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            decoder_hidden_size=16,
            num_attention_heads=[1, 2, 4, 8],
        ),
        "convnext": text(
            "ConvNextForImageClassification", image(64), hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]
        ),
        "convnextv2": text(
            "ConvNextV2ForImageClassification", image(64), hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]
        ),
        "resnet": text("ResNetForImageClassification", image(64), **backbone),
        "regnet": text("RegNetForImageClassification", image(64), **backbone, groups_width=4),
        "mobilenet_v1": text("MobileNetV1ForImageClassification", image(64), depth_multiplier=0.25),
        "mobilenet_v2": text("MobileNetV2ForImageClassification", image(64), depth_multiplier=0.25),
        "mobilevit": text(
            "MobileViTForImageClassification",
            image(64),
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 32],
            num_attention_heads=4,
            image_size=64,
        ),
        "poolformer": text(
            "PoolFormerForImageClassification", image(64), hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]
        ),
        "levit": text(
            "LevitForImageClassification",
            image(64),
            image_size=64,
            hidden_sizes=[16, 32, 48],
            num_attention_heads=[2, 2, 4],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
        ),
        "yolos": text(
            "YolosForObjectDetection", image(), **(vision | {"image_size": [32, 32]}), num_detection_tokens=5
        ),
        "detr": text("DetrForObjectDetection", image(64), **detr),
        "clip_vision": text("CLIPVisionModel", image(), **vision),
        "wav2vec2": text("Wav2Vec2ForCTC", sound, **waves),
        "hubert": text("HubertForCTC", sound, **waves),
        "whisper": text(
            "WhisperForConditionalGeneration",
            lambda: {"input_features": torch.randn(BATCH, 16, 64), "decoder_input_ids": _ids(6)},
            **(
                seq2seq
                | {
                    "max_source_positions": 32,
                    "max_target_positions": 16,
                    "num_mel_bins": 16,
                    "pad_token_id": 0,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                    "decoder_start_token_id": 1,
                }
            ),
        ),
    }
