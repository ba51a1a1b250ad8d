"""The forms of a published model's config.json: what each can express, and how it is written. No torch.

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

from models.config import DataConfig, Frozen, GateConfig, ModelConfig, TrainConfig, TrialConfig

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
_TRIAL_FIELDS = frozenset({"model", "gate", "more_gates", "data", "train", "precision", "fp8", "seed"})


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
