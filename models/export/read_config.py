"""A published config.json to the architecture that can be built here, or a refusal that names the key. No torch.

Every key that changes a model's numbers is asked for; those that nobody here knows are handed on by name.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from models.config import GateConfig, ModelConfig, MoEConfig
from models.export.forms import SHARED_EXPERT_SIZE, Architecture, Form, Refused

_NEUTRAL = frozenset(
    {
        # How it was made or stored, or of training and generation only; auto_map names code, which is never run.
        *("architectures", "auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"),
        *("bos_token_id", "pad_token_id", "attention_dropout", "output_router_logits", "router_aux_loss_coef"),
        *("output_attentions", "output_hidden_states", "return_dict"),
        # Of the layers of Qwen3-Next with linear attention, and of windows: there are none.
        *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
        *("linear_value_head_dim", "full_attention_interval", "sliding_window", "max_window_layers"),
        # Of experts, in a dense model.
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"),
        *("mlp_only_layers", "shared_expert_intermediate_size"),
    }
)


class _Keys:
    """config.json, with a record of what was asked for."""

    def __init__(self, content: dict[str, Any], place: str) -> None:
        self.content, self.place, self.asked = content, place, set(_NEUTRAL)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return self.content.get(key, default)

    def count(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise Refused(f"{self.place}: {key} must be a positive integer, got {value!r}")
        return value

    def only(self, key: str, allowed: Any, default: Any, reason: str) -> None:
        value = self.get(key, default)
        if value != allowed:
            raise Refused(f"{self.place}: {key} is {value!r}, allowed is {allowed!r}: {reason}")


def read_config(content: dict[str, Any], place: str) -> Architecture:
    """The architecture that a config.json describes; raises Refused when it is not one that can be built here."""
    keys = _Keys(content, place)
    model_type = keys.get("model_type")
    if model_type not in _READERS:
        raise Refused(f"{place}: model_type is {model_type!r}, allowed are {', '.join(_READERS)}")
    keys.only("quantization_config", None, None, "quantised weights are not read")
    keys.only("hidden_act", "silu", "silu", "the FFN here is SwiGLU")
    for key in ("attention_bias", "qkv_bias"):
        keys.only(key, False, False, "projections here have no bias")
    keys.only("use_sliding_window", False, False, "attention here is over the whole sequence")
    num_layers = keys.count("num_hidden_layers")
    if set(types := keys.get("layer_types") or _default_layer_types(keys, num_layers)) != {"full_attention"}:
        raise Refused(f"{place}: layer_types has {', '.join(sorted(set(types)))}: only full_attention is built here")
    if len(types) != num_layers:
        raise Refused(f"{place}: layer_types has {len(types)} entries for num_hidden_layers {num_layers}")
    form, gate, qk_norm, moe = _READERS[model_type](keys)
    try:
        model = ModelConfig(
            num_layers=num_layers,
            hidden_size=keys.count("hidden_size"),
            num_query_heads=keys.count("num_attention_heads"),
            num_kv_heads=keys.count("num_key_value_heads"),
            head_dim=keys.count("head_dim"),
            ffn_size=keys.count("intermediate_size" if moe is None else "moe_intermediate_size"),
            moe=moe,
            qk_norm=qk_norm,
            tied_embeddings=keys.get("tie_word_embeddings", False),
            rope_base=_rope_base(keys, model_type),
            norm_epsilon=keys.get("rms_norm_eps", 1e-6),
            init_std=keys.get("initializer_range", 0.02),
        )
    except ValidationError as error:
        raise Refused(f"{place}: {_told(error)}") from error
    keys.get("intermediate_size")
    return Architecture(
        form=form,
        model=model,
        gate=gate,
        vocab_size=keys.count("vocab_size"),
        context=keys.count("max_position_embeddings"),
        separator=_separator(keys),
        not_understood=tuple(sorted(set(content) - keys.asked)),
    )


def _told(error: ValidationError) -> str:
    return "; ".join(": ".join([*map(str, one["loc"]), one["msg"]]) for one in error.errors())


def _separator(keys: _Keys) -> int | None:
    """Of several the first; none is no mistake, many a folder names it elsewhere."""
    found = keys.get("eos_token_id")
    if isinstance(found, list) and found:
        found = found[0]
    if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
        raise Refused(f"{keys.place}: eos_token_id must be an integer, got {found!r}")
    return found


def _default_layer_types(keys: _Keys, num_layers: int) -> list[str]:
    if keys.content["model_type"] != "qwen3_next" or keys.content.get("full_attention_interval", 4) == 1:
        return ["full_attention"] * num_layers
    return ["linear_attention", "full_attention"]


def _rope_base(keys: _Keys, model_type: str) -> float:
    """Of transformers 5 (``rope_parameters``), or of earlier ones (``rope_theta``, ``rope_scaling``)."""
    keys.only("rope_scaling", None, None, "plain RoPE is built here; scaled positions change every number")
    rope = {"rope_theta": keys.get("rope_theta", 10_000.0), "rope_type": "default"}
    rope["partial_rotary_factor"] = keys.get("partial_rotary_factor", 0.25 if model_type == "qwen3_next" else 1.0)
    rope |= keys.get("rope_parameters") or {}
    known = {"rope_theta": rope["rope_theta"], "rope_type": "default", "partial_rotary_factor": 1.0}
    if rope != known or not isinstance(rope["rope_theta"], int | float):
        raise Refused(f"{keys.place}: RoPE is {rope}; allowed is plain RoPE over the whole head dimension, {known}")
    return float(rope["rope_theta"])


_Read = tuple[Form, GateConfig | None, bool, MoEConfig | None]
_ELEMENTWISE = GateConfig(position="sdpa", granularity="elementwise")
_HEADWISE = GateConfig(position="sdpa", granularity="headwise")


def _read_next(keys: _Keys) -> _Read:
    dense = keys.get("mlp_only_layers") or []
    num_layers = keys.content["num_hidden_layers"]
    if keys.get("num_experts", 512) == 0 or sorted(dense) == list(range(num_layers)):
        return "qwen3-next", _ELEMENTWISE, True, None
    keys.only("shared_expert_intermediate_size", SHARED_EXPERT_SIZE, 512, "shared experts are not built here")
    return "qwen3-next", _ELEMENTWISE, True, _read_moe(keys)


def _read_qwen3(keys: _Keys) -> _Read:
    headwise, elementwise = (keys.get(f"{name}wise_attn_output_gate") for name in ("head", "element"))
    if headwise and elementwise:
        raise Refused(f"{keys.place}: headwise_attn_output_gate and elementwise_attn_output_gate are both true")
    qk_norm = keys.get("use_qk_norm", True)
    if headwise is None and elementwise is None and qk_norm is True:
        return "qwen3", None, True, None
    return "released", _HEADWISE if headwise else _ELEMENTWISE if elementwise else None, qk_norm, None


def _read_qwen3_moe(keys: _Keys) -> _Read:
    return "qwen3", None, True, _read_moe(keys)


def _read_moe(keys: _Keys) -> MoEConfig:
    keys.only("decoder_sparse_step", 1, 1, "experts are in every layer here, or in none")
    if keys.get("mlp_only_layers"):
        raise Refused(f"{keys.place}: mlp_only_layers names some layers: experts are in every layer here, or in none")
    top_k = keys.count("num_experts_per_tok")
    keys.only("norm_topk_prob", top_k > 1, False, "the chosen weights sum to one here, but for num_experts_per_tok 1")
    try:
        aux = keys.get("router_aux_loss_coef", 1e-3)
        return MoEConfig(num_experts=keys.count("num_experts"), top_k=top_k, aux_loss_coefficient=aux)
    except ValidationError as error:
        raise Refused(f"{keys.place}: {_told(error)}") from error


_READERS = {"qwen3": _read_qwen3, "qwen3_moe": _read_qwen3_moe, "qwen3_next": _read_next}
