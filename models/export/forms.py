"""The forms of a published model's config.json: what each can express, how it is written, how it is read. No torch.

- ``qwen3-next``: transformers' Qwen3-Next with full attention in every layer. The elementwise gate on the SDPA output.
- ``released``: the code released with the paper (github.com/qiuzh20/gated_attention), Qwen3 with two flags. Both
  granularities of that gate, or none; dense only. transformers' own Qwen3 does not know the flags.
- ``qwen3``: transformers' Qwen3 and Qwen3-MoE. No gate.

What a form cannot express is refused with the reason: a folder that computes something else is worse than none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import ValidationError

from models.config import DataConfig, Frozen, GateConfig, ModelConfig, MoEConfig, TrainConfig, TrialConfig

Form = Literal["qwen3-next", "released", "qwen3"]
FORMS: tuple[Form, ...] = get_args(Form)


class Refused(ValueError):
    """What a form cannot express, or a folder that cannot be taken; the message names the place and the reason."""


@dataclass(frozen=True)
class Architecture:
    """What the tensors of a folder mean: enough to name them all, and to build the model that they go into."""

    form: Form
    model: ModelConfig
    gate: GateConfig | None
    vocab_size: int
    context: int
    """Tokens that the model was made for (``max_position_embeddings``)."""
    separator: int | None
    """The token that ends a document (``eos_token_id``)."""
    not_understood: tuple[str, ...] = ()
    """Keys of config.json that are none of those known here. They may change the model's numbers."""

    def trial(self, sequence_length: int, precision: Literal["fp32", "bf16"]) -> TrialConfig:
        """A config to build the model from; its training part is never used."""
        return TrialConfig(
            model=self.model,
            gate=self.gate,
            data=DataConfig(vocab_size=self.vocab_size, sequence_length=sequence_length),
            train=TrainConfig(tokens=sequence_length, batch_tokens=sequence_length, lr=1.0),
            precision=precision,
            seed=0,
        )


# -- what a form can express --------------------------------------------------------------------------------------

_MODEL_FIELDS = frozenset(
    {
        *("num_layers", "hidden_size", "num_query_heads", "num_kv_heads", "head_dim", "ffn_size", "moe", "qk_norm"),
        *("tied_embeddings", "rope_base", "norm_epsilon", "init_std"),
    }
)
_GATE_FIELDS = frozenset({"granularity"})
_TRIAL_FIELDS = frozenset({"model", "gate", "more_gates", "data", "train", "precision", "seed"})


def architecture_of(trial: TrialConfig, form: Form, separator: int) -> Architecture:
    """The trial's model in ``form``; raises Refused with all that the form lacks."""
    reasons = list(_objections(trial, form))
    if reasons:
        raise Refused(f"format {form} cannot express this trial: {'; '.join(reasons)}")
    return Architecture(form, trial.model, trial.gate, trial.data.vocab_size, trial.data.sequence_length, separator)


def _objections(trial: TrialConfig, form: Form) -> Iterator[str]:
    yield from _set_beyond(trial, _TRIAL_FIELDS, "")
    yield from _set_beyond(trial.model, _MODEL_FIELDS, "model.")
    if len(trial.gates) > 1:
        yield f"gates at {len(trial.gates)} places ({', '.join(gate.position for gate in trial.gates)})"
        return
    gate = trial.gate
    if gate is not None:
        if gate.position != "sdpa":
            yield f"gate.position {gate.position} (the forms have a gate on the SDPA output only)"
        if gate.init == "open":
            yield "gate.init open (the forms have no offset on the logits)"
        yield from _set_beyond(gate, _GATE_FIELDS | {"position", "init"}, "gate.")
    yield from _FORM_OBJECTIONS[form](trial.model, gate)


def _set_beyond(config: Frozen, known: frozenset[str], prefix: str) -> Iterator[str]:
    """Fields that are neither known nor at their default: also those that are added after this was written."""
    for name, field in type(config).model_fields.items():
        if name not in known and (value := getattr(config, name)) != field.default:
            yield f"{prefix}{name} {value}"


def _next_objections(model: ModelConfig, gate: GateConfig | None) -> Iterator[str]:
    if gate is None:
        yield "Qwen3-Next always gates, and the trial has no gate (format qwen3 takes it)"
    elif gate.granularity == "headwise":
        yield "gate.granularity headwise (Qwen3-Next gates elementwise; format released takes it)"
    if not model.qk_norm:
        yield "model.qk_norm false (Qwen3-Next always norms queries and keys)"


def _released_objections(model: ModelConfig, gate: GateConfig | None) -> Iterator[str]:
    if model.moe is not None:
        yield "model.moe (the released code has no experts; format " + ("qwen3-next" if gate else "qwen3") + " has)"


def _qwen3_objections(model: ModelConfig, gate: GateConfig | None) -> Iterator[str]:
    if gate is not None:
        yield "Qwen3 has no gate (formats qwen3-next and released have)"
    if not model.qk_norm:
        yield "model.qk_norm false (Qwen3 always norms queries and keys; format released takes it)"


_FORM_OBJECTIONS = {"qwen3-next": _next_objections, "released": _released_objections, "qwen3": _qwen3_objections}


# -- writing config.json ------------------------------------------------------------------------------------------


def config_json(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The content of config.json; ``dtype`` is torch's name of the stored tensors' type, such as ``float32``."""
    model = architecture.model
    common = {
        "vocab_size": architecture.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_query_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": architecture.context,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "rope_theta": model.rope_base,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": architecture.separator,
        "eos_token_id": architecture.separator,
    }
    return _OWN_KEYS[architecture.form](model, architecture.gate) | common | _dtype_key(architecture.form, dtype)


def _dtype_key(form: Form, dtype: str) -> dict[str, str]:
    """The released code is of the time when transformers called it ``torch_dtype``."""
    return {"torch_dtype" if form == "released" else "dtype": dtype}


def _next_keys(model: ModelConfig, _: GateConfig | None) -> dict[str, Any]:
    layers = list(range(model.num_layers))
    moe = {"mlp_only_layers": layers, "num_experts": 0} if model.moe is None else _moe_keys(model)
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "layer_types": ["full_attention"] * model.num_layers,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base, "partial_rotary_factor": 1.0},
        # Qwen3-Next's experts always come with a shared one; ours is one wide, with zeros for weights.
        **({} if model.moe is None else {"shared_expert_intermediate_size": SHARED_EXPERT_SIZE}),
        **moe,
    }


SHARED_EXPERT_SIZE = 1


def _released_keys(model: ModelConfig, gate: GateConfig | None) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "headwise_attn_output_gate": gate is not None and gate.granularity == "headwise",
        "elementwise_attn_output_gate": gate is not None and gate.granularity == "elementwise",
        "use_qk_norm": model.qk_norm,
        "qkv_bias": False,
        "use_sliding_window": False,
        "rope_scaling": None,
    }


def _qwen3_keys(model: ModelConfig, _: GateConfig | None) -> dict[str, Any]:
    is_moe = model.moe is not None
    return {
        "architectures": ["Qwen3MoeForCausalLM" if is_moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if is_moe else "qwen3",
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        **(_moe_keys(model) if is_moe else {}),
    }


def _moe_keys(model: ModelConfig) -> dict[str, Any]:
    """The z-loss has no key; it does not enter the model's output."""
    assert model.moe is not None
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k,
        "moe_intermediate_size": model.ffn_size,
        "norm_topk_prob": model.moe.top_k > 1,
        "router_aux_loss_coef": model.moe.aux_loss_coefficient,
    }


_OWN_KEYS = {"qwen3-next": _next_keys, "released": _released_keys, "qwen3": _qwen3_keys}


# -- reading config.json ------------------------------------------------------------------------------------------

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

    def number(self, key: str) -> Any:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused(f"{self.place}: {key} must be a number, got {value!r}")
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
    num_layers = keys.number("num_hidden_layers")
    if set(types := keys.get("layer_types") or _default_layer_types(keys, num_layers)) != {"full_attention"}:
        raise Refused(f"{place}: layer_types has {', '.join(sorted(set(types)))}: only full_attention is built here")
    if len(types) != num_layers:
        raise Refused(f"{place}: layer_types has {len(types)} entries for num_hidden_layers {num_layers}")
    form, gate, qk_norm, moe = _READERS[model_type](keys)
    try:
        model = ModelConfig(
            num_layers=num_layers,
            hidden_size=keys.number("hidden_size"),
            num_query_heads=keys.number("num_attention_heads"),
            num_kv_heads=keys.number("num_key_value_heads"),
            head_dim=keys.number("head_dim"),
            ffn_size=keys.number("intermediate_size" if moe is None else "moe_intermediate_size"),
            moe=moe,
            qk_norm=qk_norm,
            tied_embeddings=keys.get("tie_word_embeddings", False),
            rope_base=_rope_base(keys, model_type),
            norm_epsilon=keys.get("rms_norm_eps", 1e-6),
            init_std=keys.get("initializer_range", 0.02),
        )
    except ValidationError as error:
        raise Refused(f"{place}: {'; '.join(one['msg'] for one in error.errors())}") from error
    keys.get("intermediate_size")
    separator = keys.get("eos_token_id")
    return Architecture(
        form=form,
        model=model,
        gate=gate,
        vocab_size=keys.number("vocab_size"),
        context=keys.number("max_position_embeddings"),
        separator=separator[0] if isinstance(separator, list) and separator else separator,
        not_understood=tuple(sorted(set(content) - keys.asked)),
    )


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
    if rope != known:
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
    top_k = keys.number("num_experts_per_tok")
    keys.only("norm_topk_prob", top_k > 1, False, "the chosen weights sum to one here, but for num_experts_per_tok 1")
    try:
        aux = float(keys.get("router_aux_loss_coef", 1e-3))
        return MoEConfig(num_experts=keys.number("num_experts"), top_k=top_k, aux_loss_coefficient=aux)
    except ValidationError as error:
        raise Refused(f"{keys.place}: {'; '.join(one['msg'] for one in error.errors())}") from error


_READERS = {"qwen3": _read_qwen3, "qwen3_moe": _read_qwen3_moe, "qwen3_next": _read_next}
