"""Proofs that our numbers are those of code that others wrote: same weights, fp32, logits and gradients.

``python tests/bench/parity.py`` prints a row a proof; tests/test_parity.py asserts the bounds. A proof is a function
that returns the largest max|a - b| / max|b| of the outputs and, over all weights, of the gradients. All expect one
rank: the ``world`` of the tests, or the one that ``main`` joins.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import released_decoder
import torch
from oracle import relative_error, token_weight
from safetensors.torch import load_file
from small_trials import SMALL, SMALL_SEQUENCE, build, small_batch, small_trial
from torch import Tensor, nn

from models import device, export
from models.config import GateConfig, MoEConfig, TrialConfig
from models.export.weights import weights

ELEMENTWISE = GateConfig(position="sdpa")
HEADWISE = GateConfig(position="sdpa", granularity="headwise")
EXPERTS = SMALL.model_copy(
    update={"moe": MoEConfig(num_experts=4, top_k=2, aux_loss_coefficient=0, z_loss_coefficient=0), "ffn_size": 16}
)


@dataclass(frozen=True)
class Difference:
    """Relative to the other's largest number."""

    outputs: float
    gradients: float


@dataclass(frozen=True)
class Proof:
    name: str
    against: str
    measure: Callable[[], Difference]


# -- ours ---------------------------------------------------------------------------------------------------------


def our_logits(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    """[B, S, vocabulary], of a Megatron model."""
    with device.on("cpu"):
        positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        logits: Tensor = model(input_ids=tokens_BS, position_ids=positions, attention_mask=None)
    return logits


def weighted_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """One number to differentiate, in which no token's mistake cancels another's."""
    losses = nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none")
    return (losses * token_weight(labels_BS).flatten().float()).sum()


def as_published(architecture: export.Architecture, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our gradients by the published tensors' names: rows are moved, and a gradient knows no offset."""
    return {
        name: part
        for weight in weights(architecture)
        for name, part in zip(weight.published, weight.split(named[weight.ours]), strict=True)
    }


def exported(trial: TrialConfig, form: export.Form, directory: Path) -> tuple[nn.Module, export.Architecture]:
    """The model of ``trial``, its weights redrawn, and its folder written to ``directory``."""
    model = build(trial)
    architecture = export.architecture_of(trial, form, separator=0)
    export.write_folder(directory, architecture, model, tokenizer={}, provenance={})
    return model, architecture


def against_folder(trial: TrialConfig, form: export.Form, theirs: Callable[[Path, Tensor, Tensor], Any]) -> Difference:
    """``theirs`` reads the exported folder: (folder, tokens, labels) to (logits, gradients by published name)."""
    tokens_BS, labels_BS = small_batch()
    with tempfile.TemporaryDirectory() as name:
        model, architecture = exported(trial, form, Path(name) / "model")
        expected_logits, expected = theirs(Path(name) / "model", tokens_BS, labels_BS)
    logits = our_logits(model, tokens_BS)
    weighted_loss(logits, labels_BS).backward()
    gradients = as_published(architecture, {key: weight.grad for key, weight in model.named_parameters()})
    assert gradients.keys() <= expected.keys(), gradients.keys() - expected.keys()
    errors = [relative_error(gradient, expected[key]) for key, gradient in gradients.items()]
    return Difference(relative_error(logits, expected_logits), max(errors))


# -- theirs -------------------------------------------------------------------------------------------------------


def transformers_reads(directory: Path, tokens_BS: Tensor, labels_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The folder as transformers loads it, with its own eager attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    logits = model(input_ids=tokens_BS, use_cache=False).logits
    weighted_loss(logits, labels_BS).backward()
    return logits, _single_experts({name: weight.grad for name, weight in model.named_parameters()})


def _single_experts(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers keeps experts stacked and gate and up fused, but stores them one by one."""
    single = {}
    for name, gradient in gradients.items():
        stem = name.removesuffix("gate_up_proj").removesuffix("down_proj")
        if name.endswith("experts.gate_up_proj"):
            for expert, fused in enumerate(gradient):
                parts = fused.chunk(2)
                single |= {f"{stem}{expert}.{part}_proj.weight": parts[i] for i, part in enumerate(("gate", "up"))}
        elif name.endswith("experts.down_proj"):
            single |= {f"{stem}{expert}.down_proj.weight": one for expert, one in enumerate(gradient)}
        else:
            single[name] = gradient
    return single


def plain_torch_reads(directory: Path, tokens_BS: Tensor, labels_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The folder as the independent decoder of the released layout reads it."""
    config = json.loads((directory / "config.json").read_text())
    published = {name: one.requires_grad_() for name, one in load_file(directory / "model.safetensors").items()}
    logits = released_decoder.logits(config, published, tokens_BS)
    weighted_loss(logits, labels_BS).backward()
    return logits, {name: one.grad for name, one in published.items() if one.grad is not None}


def qwen3_next_attention() -> Difference:
    """One layer's attention alone: output, gradients of its weights and of its input, against Qwen3NextAttention."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

    trial = small_trial(ELEMENTWISE)
    model = build(trial)
    architecture = export.architecture_of(trial, "qwen3-next", separator=0)
    named = dict(model.named_parameters())
    stem = "model.layers.0.self_attn."
    own = [one for one in weights(architecture) if one.ours.startswith("decoder.layers.0.self_attention.")]
    config = Qwen3NextConfig(**export.forms.config_json(architecture, "float32"), attn_implementation="eager")
    theirs = Qwen3NextAttention(config, layer_idx=0)
    published = [one.to_published(named[one.ours].detach()) for one in own]
    theirs.load_state_dict({name.removeprefix(stem): part for parts in published for name, part in parts.items()})

    generator = torch.Generator().manual_seed(1)
    x_SBH = torch.randn(SMALL_SEQUENCE, 2, SMALL.hidden_size, generator=generator, requires_grad=True)
    out_weight = torch.randn(x_SBH.shape, generator=generator)
    with device.on("cpu"):
        rope = model.rotary_pos_emb(SMALL_SEQUENCE)
        ours, _ = model.decoder.layers[0].self_attention(x_SBH, attention_mask=None, rotary_pos_emb=rope)
    (ours * out_weight).sum().backward()

    x_BSH = x_SBH.detach().transpose(0, 1).contiguous().requires_grad_()
    positions = Qwen3NextRotaryEmbedding(config)(x_BSH, torch.arange(SMALL_SEQUENCE)[None])
    future = torch.full((SMALL_SEQUENCE, SMALL_SEQUENCE), float("-inf")).triu(1)[None, None]
    expected, _ = theirs(x_BSH, position_embeddings=positions, attention_mask=future)
    (expected * out_weight.transpose(0, 1)).sum().backward()

    errors = [relative_error(x_SBH.grad.transpose(0, 1), x_BSH.grad)]
    for one in own:
        for name, part in zip(one.published, one.split(named[one.ours].grad), strict=True):
            errors.append(relative_error(part, theirs.get_parameter(name.removeprefix(stem)).grad))
    return Difference(relative_error(ours.transpose(0, 1), expected), max(errors))


def megatrons_own_gate() -> Difference:
    """The whole model with Megatron's ``attention_output_gate``, its own modules and core attention."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    trial = small_trial(ELEMENTWISE)
    architecture = export.architecture_of(trial, "qwen3-next", separator=0)
    ours = build(trial)
    with device.on("cpu"):
        theirs = GPTModel(
            config=dataclasses.replace(ours.config, attention_output_gate=True),
            transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
            vocab_size=trial.data.vocab_size,
            max_sequence_length=trial.data.sequence_length,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
            rotary_base=trial.model.rope_base,
        )
    theirs.load_state_dict(ours.state_dict())
    tokens_BS, labels_BS = small_batch()
    logits, gradients = [], []
    for model in (ours, theirs):
        logits.append(our_logits(model, tokens_BS))
        weighted_loss(logits[-1], labels_BS).backward()
        named = {name: weight.grad for name, weight in model.named_parameters()}
        gradients.append(as_published(architecture, named))
    errors = [relative_error(one, gradients[1][name]) for name, one in gradients[0].items()]
    return Difference(relative_error(*logits), max(errors))


# -- the list -----------------------------------------------------------------------------------------------------

UNTIED = {"tied_embeddings": False, "rope_base": 1e6}
PROOFS = [
    Proof("model, G1 elementwise", "Megatron-Core's attention_output_gate", megatrons_own_gate),
    Proof("attention, G1 elementwise", "transformers Qwen3NextAttention", qwen3_next_attention),
    Proof(
        "model, G1 elementwise",
        "transformers Qwen3NextForCausalLM",
        lambda: against_folder(small_trial(ELEMENTWISE), "qwen3-next", transformers_reads),
    ),
    Proof(
        "MoE model, G1 elementwise",
        "transformers Qwen3NextForCausalLM",
        lambda: against_folder(small_trial(ELEMENTWISE, EXPERTS), "qwen3-next", transformers_reads),
    ),
    Proof(
        "model, no gate",
        "transformers Qwen3ForCausalLM",
        lambda: against_folder(small_trial(None, SMALL.model_copy(update=UNTIED)), "qwen3", transformers_reads),
    ),
    Proof(
        "MoE model, no gate",
        "transformers Qwen3MoeForCausalLM",
        lambda: against_folder(small_trial(None, EXPERTS), "qwen3", transformers_reads),
    ),
    Proof(
        "model, G1 elementwise",
        "released layout, plain torch",
        lambda: against_folder(small_trial(ELEMENTWISE), "released", plain_torch_reads),
    ),
    Proof(
        "model, G1 headwise",
        "released layout, plain torch",
        lambda: against_folder(small_trial(HEADWISE), "released", plain_torch_reads),
    ),
    Proof(
        "model, no gate, no QK-norm",
        "released layout, plain torch",
        lambda: against_folder(
            small_trial(None, SMALL.model_copy(update={"qk_norm": False})), "released", plain_torch_reads
        ),
    ),
]


def main() -> None:
    from transformers.utils.logging import disable_progress_bar

    from models.config import Layout
    from models.trainer import World

    with tempfile.TemporaryDirectory() as folder:
        world = World.join(0, Layout(), "cpu", f"file://{folder}/meet")
        disable_progress_bar()
        print("| what | against | outputs | gradients |\n|---|---|---:|---:|")
        for proof in PROOFS:
            found = proof.measure()
            print(f"| {proof.name} | {proof.against} | {found.outputs:.1e} | {found.gradients:.1e} |", flush=True)
        world.leave()


if __name__ == "__main__":
    main()
