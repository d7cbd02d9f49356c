"""The rows of the coverage table.

Configurations keep their defaults but for sizes and dropout, which is 0 so that gradients can be
compared. Labels go in; loss and whatever else the model returns come out.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import causal_batch, masked_batch
from benchmarks.nanogpt import GPT, GPTConfig
from benchmarks.zoo import plain
from benchmarks.zoo.records import Architecture, Compiler, Scale, Unavailable

Changes = Callable[[Scale], dict[str, Any]]

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_FIRST = 5  # smaller token ids have a meaning to some models
_CLASSES = 10
_EXPERTS = 4


def _transformers(model: str, config: str, **fields: Any) -> nn.Module:
    """A model of transformers with random weights, without dropout.

    Raises:
        Unavailable: the installed version lacks the class.
    """
    import transformers  # takes seconds, and the plain models do not need it

    try:
        configuration: Any = getattr(transformers, config)(**fields)
        build: Any = getattr(transformers, model)
    except AttributeError as error:
        raise Unavailable(f"transformers {transformers.__version__} has no {model}") from error
    _without_dropout(configuration)
    return build(configuration)


def _without_dropout(config: Any) -> None:
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif hasattr(value, "to_dict"):
            _without_dropout(value)


def _common(s: Scale) -> dict[str, Any]:
    """What most configurations call their sizes."""
    return {
        "hidden_size": s.hidden,
        "intermediate_size": s.wide,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "vocab_size": s.vocab,
        "max_position_embeddings": s.tokens,
    }


def _nothing(s: Scale) -> dict[str, Any]:
    return {}


def _kv(s: Scale) -> dict[str, Any]:
    return {"num_key_value_heads": max(1, s.heads // 2)}


def _kv_dim(s: Scale) -> dict[str, Any]:
    return _kv(s) | {"head_dim": s.head_dim}


def _kv_special(s: Scale) -> dict[str, Any]:
    return _kv(s) | _SPECIAL


def _lm_batch(s: Scale) -> dict[str, Any]:
    return causal_batch(s.vocab, s.rows, s.tokens, "cpu", _FIRST)


def _masked_batch(s: Scale) -> dict[str, Any]:
    return masked_batch(s.vocab, s.rows, s.tokens, "cpu")


def _classes(s: Scale) -> Tensor:
    return torch.randint(_CLASSES, (s.rows,))


def _language_model(
    name: str,
    title: str,
    stem: str,
    changes: Changes = _nothing,
    *,
    config: str = "",
    kind: str = "ForCausalLM",
    sizes: Callable[[Scale], dict[str, Any]] = _common,
    batch: Callable[[Scale], dict[str, Any]] = _lm_batch,
    experts: int = 0,
    has_vocabulary: bool = True,
    **shape: int,
) -> Architecture:
    """A row for `<stem><kind>` of transformers; `shape` is what differs from the rows' sizes."""

    def build(s: Scale) -> nn.Module:
        fields = sizes(s) | changes(s)
        return _transformers(stem + kind, config or f"{stem}Config", **fields)

    return Architecture(
        name, title, build, batch, shape, has_vocabulary=has_vocabulary, experts=experts
    )


# --- decoders


def _llama4(s: Scale) -> dict[str, Any]:
    own = {"intermediate_size_mlp": s.wide, "attention_chunk_size": max(1, s.tokens // 4)}
    return _kv_dim(s) | _SPECIAL | own | {"num_local_experts": _EXPERTS}


def _gpt2_sizes(s: Scale) -> dict[str, Any]:
    sizes = {"n_embd": s.hidden, "n_layer": s.layers, "n_head": s.heads}
    return sizes | {"vocab_size": s.vocab, "n_positions": s.tokens}


def _rotary_half(s: Scale) -> dict[str, Any]:
    return {"rotary_dim": s.head_dim // 2}


def _opt(s: Scale) -> dict[str, Any]:
    return {"ffn_dim": s.wide, "word_embed_proj_dim": s.hidden}


def _bloom_sizes(s: Scale) -> dict[str, Any]:
    sizes = {"hidden_size": s.hidden, "n_layer": s.layers, "n_head": s.heads}
    return sizes | {"vocab_size": s.vocab}


def _mpt_sizes(s: Scale) -> dict[str, Any]:
    sizes = {"d_model": s.hidden, "n_layers": s.layers, "n_heads": s.heads}
    return sizes | {"vocab_size": s.vocab, "max_seq_len": s.tokens}


_DECODERS = (
    _language_model("llama", "Llama", "Llama", _kv),
    _language_model(
        "llama4", "Llama-4", "Llama4", _llama4, config="Llama4TextConfig", experts=_EXPERTS
    ),
    _language_model("mistral", "Mistral", "Mistral", _kv, rows=2, tokens=511),
    _language_model("qwen2", "Qwen2", "Qwen2", _kv),
    _language_model("qwen3", "Qwen3", "Qwen3", _kv_dim, tokens=1021),
    _language_model("gemma", "Gemma", "Gemma", _kv_dim),
    _language_model("gemma2", "Gemma-2", "Gemma2", _kv_dim, rows=2, tokens=512),
    _language_model("gemma3", "Gemma-3", "Gemma3", _kv_dim, config="Gemma3TextConfig"),
    _language_model("phi", "Phi", "Phi"),
    _language_model("phi3", "Phi-3", "Phi3", _kv_special),
    _language_model("gpt2", "GPT-2", "GPT2", sizes=_gpt2_sizes, kind="LMHeadModel"),
    _language_model("gptneox", "GPT-NeoX", "GPTNeoX"),
    _language_model("gptj", "GPT-J", "GPTJ", _rotary_half, sizes=_gpt2_sizes),
    _language_model("opt", "OPT", "OPT", _opt, rows=2, tokens=512),
    _language_model("bloom", "BLOOM", "Bloom", sizes=_bloom_sizes),
    _language_model("falcon", "Falcon", "Falcon"),
    _language_model("stablelm", "StableLM", "StableLm", _kv, rows=2, tokens=511),
    _language_model("cohere", "Cohere", "Cohere", _kv),
    _language_model("olmo2", "OLMo-2", "Olmo2", _kv),
    _language_model("granite", "Granite", "Granite", _kv),
    _language_model("smollm3", "SmolLM-3", "SmolLM3", _kv_special, rows=2, tokens=512),
    _language_model("mpt", "MPT", "Mpt", sizes=_mpt_sizes),
)


# --- mixtures of experts


def _gated(width: str, number: str, *parts: Changes) -> Changes:
    """Four experts, two per token; `width` and `number` are the configuration's names."""

    def changes(s: Scale) -> dict[str, Any]:
        fields = {"num_experts_per_tok": 2, number: _EXPERTS, width: 2 * s.hidden}
        for part in parts:
            fields |= part(s)
        return fields

    return changes


def _shared_expert(s: Scale) -> dict[str, Any]:
    return {"shared_expert_intermediate_size": 2 * s.hidden}


def _window(s: Scale) -> dict[str, Any]:
    return {"sliding_window": s.tokens // 4}


def _latent(s: Scale) -> dict[str, Any]:
    heads = {"num_key_value_heads": s.heads, "qk_rope_head_dim": s.head_dim // 2}
    heads |= {"qk_nope_head_dim": s.head_dim // 2, "v_head_dim": s.head_dim}
    ranks = {"q_lora_rank": s.hidden // 2, "kv_lora_rank": s.hidden // 2}
    groups = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
    return heads | ranks | groups | {"num_hidden_layers": max(2, s.layers)}


_EXPERT_MODELS = (
    _language_model(
        "mixtral",
        "Mixtral",
        "Mixtral",
        _gated("intermediate_size", "num_local_experts", _kv),
        experts=_EXPERTS,
    ),
    _language_model(
        "qwen2moe",
        "Qwen2-MoE",
        "Qwen2Moe",
        _gated("moe_intermediate_size", "num_experts", _kv, _shared_expert),
        experts=_EXPERTS,
    ),
    _language_model(
        "qwen3moe",
        "Qwen3-MoE",
        "Qwen3Moe",
        _gated("moe_intermediate_size", "num_experts", _kv_dim),
        experts=_EXPERTS,
    ),
    _language_model(
        "gptoss",
        "GPT-OSS",
        "GptOss",
        _gated("intermediate_size", "num_local_experts", _kv_dim, _window),
        experts=_EXPERTS,
    ),
    _language_model(
        "deepseekv3",
        "DeepSeek-V3",
        "DeepseekV3",
        _gated("moe_intermediate_size", "n_routed_experts", _latent),
        experts=_EXPERTS,
    ),
)


# --- without attention


def _mamba2_sizes(s: Scale) -> dict[str, Any]:
    sizes = {"hidden_size": s.hidden, "num_hidden_layers": s.layers, "vocab_size": s.vocab}
    state = {"num_heads": 2 * s.heads, "head_dim": s.head_dim, "state_size": 16, "n_groups": 2}
    return sizes | state | {"chunk_size": max(8, s.tokens // 8)}


def _rwkv_sizes(s: Scale) -> dict[str, Any]:
    """At least two layers: it divides by the number of the last."""
    sizes = {"hidden_size": s.hidden, "num_hidden_layers": max(2, s.layers)}
    return sizes | {"vocab_size": s.vocab, "context_length": s.tokens}


_RECURRENT = (
    _language_model("mamba2", "Mamba-2", "Mamba2", sizes=_mamba2_sizes),
    # Tracing unrolls its recurrence over the tokens: many short sequences.
    _language_model("rwkv", "RWKV", "Rwkv", sizes=_rwkv_sizes, rows=64, tokens=16),
)


# --- encoders and pairs


def _bart_sizes(s: Scale) -> dict[str, Any]:
    sides = ("encoder", "decoder")
    fields: dict[str, Any] = {f"{side}_ffn_dim": s.wide for side in sides}
    fields |= {f"{side}_layers": max(1, s.layers // 2) for side in sides}
    fields |= {f"{side}_attention_heads": s.heads for side in sides}
    return fields | {"d_model": s.hidden, "vocab_size": s.vocab}


def _bart(s: Scale) -> dict[str, Any]:
    return {"max_position_embeddings": s.tokens}


def _whisper(s: Scale) -> dict[str, Any]:
    """Half as many encoder positions as frames of sound; the text as long as the sound."""
    lengths = {"max_source_positions": s.tokens, "max_target_positions": s.tokens}
    tokens = _SPECIAL | {"decoder_start_token_id": 1}
    return lengths | tokens | {"num_mel_bins": 16}


def _whisper_batch(s: Scale) -> dict[str, Any]:
    sound = torch.randn(s.rows, 16, 2 * s.tokens)
    return {"input_features": sound, "labels": torch.randint(_FIRST, s.vocab, (s.rows, s.tokens))}


def _t5_sizes(s: Scale) -> dict[str, Any]:
    sizes = {"d_model": s.hidden, "d_kv": s.head_dim, "d_ff": s.wide, "num_heads": s.heads}
    layers = {"num_layers": max(1, s.layers // 2), "vocab_size": s.vocab}
    return sizes | layers | {"decoder_start_token_id": 0}


def _t5_gated(s: Scale) -> dict[str, Any]:
    return {"feed_forward_proj": "gated-gelu"}


def _roberta(s: Scale) -> dict[str, Any]:
    return {"max_position_embeddings": s.tokens + 2}  # positions start behind the padding's


def _modernbert(s: Scale) -> dict[str, Any]:
    return _SPECIAL | {"cls_token_id": 1, "sep_token_id": 2}


_ENCODERS = (
    _language_model(
        "t5", "T5", "T5", sizes=_t5_sizes, kind="ForConditionalGeneration", rows=2, tokens=512
    ),
    _language_model(
        "t5gated",
        "T5 (gated)",
        "T5",
        _t5_gated,
        sizes=_t5_sizes,
        kind="ForConditionalGeneration",
        rows=2,
        tokens=512,
    ),
    _language_model(
        "bart",
        "BART",
        "Bart",
        _bart,
        sizes=_bart_sizes,
        kind="ForConditionalGeneration",
        rows=2,
        tokens=512,
    ),
    _language_model(
        "whisper",
        "Whisper",
        "Whisper",
        _whisper,
        sizes=_bart_sizes,
        kind="ForConditionalGeneration",
        batch=_whisper_batch,
        rows=2,
        tokens=448,
    ),
    _language_model("bert", "BERT", "Bert", kind="ForMaskedLM", batch=_masked_batch),
    _language_model(
        "roberta", "RoBERTa", "Roberta", _roberta, kind="ForMaskedLM", batch=_masked_batch, rows=2
    ),
    _language_model(
        "modernbert",
        "ModernBERT",
        "ModernBert",
        _modernbert,
        kind="ForMaskedLM",
        batch=_masked_batch,
    ),
)


# --- without a vocabulary head


def _llama_classes(s: Scale) -> dict[str, Any]:
    return _kv(s) | _SPECIAL | {"num_labels": _CLASSES}


def _bert_classes(s: Scale) -> dict[str, Any]:
    return {"num_labels": _CLASSES}


def _sentence_batch(s: Scale) -> dict[str, Any]:
    return {"input_ids": _lm_batch(s)["input_ids"], "labels": _classes(s)}


def _image_batch(s: Scale) -> dict[str, Any]:
    return {"pixel_values": torch.randn(s.rows, 3, s.image, s.image), "labels": _classes(s)}


def _patches(s: Scale) -> dict[str, Any]:
    sizes = {"hidden_size": s.hidden, "intermediate_size": s.wide}
    sizes |= {"num_hidden_layers": s.layers, "num_attention_heads": s.heads}
    return sizes | {"image_size": s.image, "patch_size": 4}


def _clip_sizes(s: Scale) -> dict[str, Any]:
    text = _common(s) | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return {"text_config": text, "vision_config": _patches(s), "projection_dim": s.hidden // 2}


def _clip_batch(s: Scale) -> dict[str, Any]:
    ids = torch.randint(_FIRST, s.vocab, (s.rows, s.tokens))
    images = _image_batch(s)["pixel_values"]
    return {"input_ids": ids, "pixel_values": images, "return_loss": True}


_HEADLESS = (
    _language_model(
        "llama-classes",
        "Llama, sequence classes",
        "Llama",
        _llama_classes,
        kind="ForSequenceClassification",
        batch=_sentence_batch,
        has_vocabulary=False,
        rows=4,
    ),
    _language_model(
        "bert-classes",
        "BERT, sequence classes",
        "Bert",
        _bert_classes,
        kind="ForSequenceClassification",
        batch=_sentence_batch,
        has_vocabulary=False,
        rows=4,
    ),
    _language_model(
        "vit",
        "ViT",
        "ViT",
        _bert_classes,
        kind="ForImageClassification",
        sizes=_patches,
        batch=_image_batch,
        has_vocabulary=False,
        rows=16,
        tokens=257,
    ),
    _language_model(
        "clip",
        "CLIP",
        "CLIP",
        kind="Model",
        sizes=_clip_sizes,
        batch=_clip_batch,
        has_vocabulary=False,
        rows=16,
        tokens=77,
    ),
)


# --- without transformers


def _nanogpt(s: Scale) -> nn.Module:
    return GPT(GPTConfig(s.tokens, s.vocab, s.layers, s.heads, s.hidden))


def _encoder(s: Scale) -> nn.Module:
    return plain.EncoderWithHead(s.vocab, s.hidden, s.heads, s.wide, s.layers)


def _titan(s: Scale) -> nn.Module:
    return plain.TitanStep(plain.TitanLlama(s.vocab, s.hidden, s.heads, s.wide, s.layers, s.tokens))


def _titan_parts(step: nn.Module, compiler: Compiler) -> Callable[..., Any]:
    """Model and loss function compiled separately, with the training loop between them."""
    model, loss = compiler(step.get_submodule("model")), compiler(plain.cross_entropy_of_tokens)
    return lambda tokens, labels: loss(model(tokens), labels)


def _tune(s: Scale, output_chunks: int = 0) -> nn.Module:
    sizes = (s.vocab, s.hidden, s.heads, s.wide, s.layers, s.tokens)
    return plain.TuneLlama(*sizes, output_chunks=output_chunks)


def _einsum(s: Scale) -> nn.Module:
    return plain.EinsumLM(s.vocab, s.hidden, s.heads, s.wide, s.layers)


def _timm(s: Scale) -> nn.Module:
    return plain.PatchTransformer(s.hidden, s.heads, s.wide, s.layers, s.image)


def _shifted(ids: str, labels: str) -> Callable[[Scale], dict[str, Any]]:
    """A batch whose labels are the next tokens, under the names that the model gives them."""

    def batch(s: Scale) -> dict[str, Any]:
        tokens = torch.randint(_FIRST, s.vocab, (s.rows, s.tokens + 1))
        return {ids: tokens[:, :-1].contiguous(), labels: tokens[:, 1:].contiguous()}

    return batch


def _timm_batch(s: Scale) -> dict[str, Any]:
    batch = _image_batch(s)
    return {"images": batch["pixel_values"], "labels": batch["labels"]}


_PLAIN = (
    Architecture(
        "nanogpt",
        "nanoGPT-style",
        _nanogpt,
        _shifted("idx", "targets"),
        {},
        blocks=("blocks",),
    ),
    Architecture(
        "encoder",
        "nn.TransformerEncoder",
        _encoder,
        _shifted("ids", "labels"),
        {"rows": 2, "tokens": 511},
        blocks=("encoder.layers",),
    ),
    Architecture(
        "torchtitan",
        "torchtitan-style Llama, loss compiled by itself",
        _titan,
        _shifted("tokens", "labels"),
        {},
        blocks=("model.layers",),
        compile=_titan_parts,
    ),
    Architecture(
        "torchtune",
        "torchtune-style Llama",
        _tune,
        _shifted("tokens", "labels"),
        {"rows": 2, "tokens": 512},
        blocks=("layers",),
    ),
    Architecture(
        "torchtune-chunked",
        "torchtune-style Llama, output in 8 chunks",
        functools.partial(_tune, output_chunks=8),
        _shifted("tokens", "labels"),
        {"rows": 2, "tokens": 512},
        blocks=("layers",),
    ),
    Architecture(
        "einsum",
        "einsums, fused QKV",
        _einsum,
        _shifted("ids", "labels"),
        {},
        blocks=("blocks",),
    ),
    Architecture(
        "timm",
        "timm-style ViT",
        _timm,
        _timm_batch,
        {"rows": 16, "tokens": 257},
        has_vocabulary=False,
        blocks=("blocks",),
    ),
)


ZOO = {
    architecture.name: architecture
    for architecture in (
        *_DECODERS,
        *_EXPERT_MODELS,
        *_RECURRENT,
        *_ENCODERS,
        *_HEADLESS,
        *_PLAIN,
    )
}
