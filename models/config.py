"""What is learnt: model, gate, data, optimiser, precision, budget and seed, and their fingerprint.

Layout, back end and micro-batch are not here: they belong to the attempt (``run_dir.AttemptSpec``).
Pure and frozen; no torch. YAML's integral floats (``1e6``) are accepted as integers, nothing else is coerced.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

NUMERICS = 1
"""Raised whenever a change alters numbers, so that an old result is never served for new code."""


def _integral(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Integer = Annotated[int, BeforeValidator(_integral)]
Count = Annotated[int, BeforeValidator(_integral), Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]

Position = Literal["sdpa", "value", "key", "query", "dense"]
POSITIONS: tuple[Position, ...] = get_args(Position)
OPEN_OFFSET = 4.0
"""sigmoid(4) = 0.982: ``init: open`` adds this to a gate's logits, so that it starts near 1."""


class Frozen(BaseModel):
    """Base of every config object: immutable, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class MoEConfig(Frozen):
    """A mixture of experts in place of every FFN: a softmax router sends each token to its ``top_k`` experts.

    No token is dropped. The chosen weights sum to one (a softmax over the chosen logits), but for ``top_k`` 1: there
    the weight is the expert's own probability, since a weight that is always one would teach the router nothing.
    The paper does not publish the coefficients: the defaults are ours.
    """

    num_experts: Annotated[int, BeforeValidator(_integral), Field(ge=2)]
    top_k: Count
    aux_loss_coefficient: Annotated[float, Field(ge=0.0)] = 1e-3
    """Of the load-balancing loss over the global batch (arXiv 2501.11873); 0 turns it off."""
    z_loss_coefficient: Annotated[float, Field(ge=0.0)] = 1e-3
    """Of the router's z-loss (ST-MoE, arXiv 2202.08906); 0 turns it off."""

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} must not exceed num_experts {self.num_experts}")
        return self


class SwitchHeadConfig(Frozen):
    """SwitchHead (arXiv 2312.07987): ``num_experts`` projections a kv head for the value, or for key and value.

    Of the layer's input a sigmoid router gives each kv head a score an expert; the ``top_k`` best experts' projections
    are summed, weighted by their scores. Key and value share the router, as the source side does there. The output's
    experts are not built: the paper of the gate (Table 6) has none.
    """

    projections: Literal["value", "key_value"]
    num_experts: Count
    top_k: Count

    @model_validator(mode="after")
    def _enough_experts(self) -> SwitchHeadConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} must not exceed num_experts {self.num_experts}")
        return self


class PluginConfig(Frozen):
    """A mechanism from another package (``models.plugins``). A sweep names options only; the plan writes both."""

    options: dict[str, Any]
    sha256: str


class ModelConfig(Frozen):
    """A decoder of the paper's shape family, dense or MoE: pre-norm RMSNorm, SwiGLU, RoPE, GQA."""

    num_layers: Count
    hidden_size: Count
    num_query_heads: Count
    num_kv_heads: Count
    head_dim: Count
    ffn_size: Count
    """Of one expert, where there are experts."""
    moe: MoEConfig | None = None
    switch_head: SwitchHeadConfig | None = None
    qk_norm: bool = True
    tied_embeddings: bool = True
    rope_base: Positive = 10_000.0
    sdpa_output: Literal["group_norm", "silu"] | None = None
    """A non-linearity on the SDPA output without a gate (paper, Table 3): RMSNorm of each head, or SiLU."""
    softmax_sink: bool = False
    """A learned logit a head in the softmax's denominator, which can take attention off the first token."""
    sandwich_norm: bool = False
    """Normalise the outputs of attention and FFN before they join the residual."""
    plugins: dict[str, PluginConfig] = Field(default={}, description="a mapping from plug-ins to their options")
    norm_epsilon: Positive = 1e-6
    init_std: Positive = 0.02

    @model_validator(mode="after")
    def _shape(self) -> ModelConfig:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"num_query_heads {self.num_query_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")
        if self.softmax_sink and self.sdpa_output == "group_norm":
            raise ValueError("softmax_sink with sdpa_output group_norm does nothing: the norm cancels a head's scale")
        return self


class GateConfig(Frozen):
    """One gate of the paper (section 2.2): Y' = Y * score or Y + score.

    ``score = scale * activation(X W + offset)`` with X the layer's input after pre-normalisation.
    """

    position: Position
    granularity: Literal["elementwise", "headwise"] = "elementwise"
    sharing: Literal["head_specific", "head_shared"] = "head_specific"
    combine: Literal["multiplicative", "additive"] = "multiplicative"
    activation: Literal["sigmoid", "silu", "ns_sigmoid", "identity"] = "sigmoid"
    input: Literal["hidden", "none", "constant"] = "hidden"
    """``none``: a zero-initialised learned parameter instead of X W; ``constant``: the score is ``scale``."""
    shared_average: Literal["scores", "logits"] = "scores"
    """Head-shared gates average after the activation (our decision), or before it."""
    qk_order: Literal["after_norm", "before_norm"] = "after_norm"
    """Key and query gates act after QK-norm and before RoPE (our decision), or before the norm."""
    init: Literal["normal", "zero", "open"] = "normal"
    """``open`` adds a fixed 4 to the logits, so that a sigmoid starts at 0.98; it is not learnt."""
    scale: Positive = 1.0

    @model_validator(mode="after")
    def _meaningful(self) -> GateConfig:
        if self.position == "dense" and self.granularity == "headwise":
            raise ValueError("granularity headwise is not allowed at position dense: its output has no heads")
        if self.position == "dense" and self.sharing == "head_shared":
            raise ValueError("sharing head_shared is not allowed at position dense: its output has no heads")
        if self.qk_order == "before_norm":
            if self.position not in ("key", "query"):
                raise ValueError(f"qk_order before_norm is for positions key and query, not {self.position}")
            if self.granularity == "headwise" and self.combine == "multiplicative":
                raise ValueError("a headwise gate before QK-norm is cancelled by the norm; use qk_order after_norm")
        if self.init == "open" and self.activation not in ("sigmoid", "ns_sigmoid"):
            raise ValueError(f"init open needs activation sigmoid or ns_sigmoid, not {self.activation}")
        if self.init != "normal" and self.input == "none":
            raise ValueError(f"init {self.init} needs input hidden: a gate with input none starts at zero logits")
        if self.shared_average == "logits" and self.sharing != "head_shared":
            raise ValueError("shared_average logits needs sharing head_shared")
        if self.input == "constant":
            free = ("position", "input", "scale")
            extra = [
                name
                for name, field in type(self).model_fields.items()
                if name not in free and getattr(self, name) != field.default
            ]
            if extra:
                raise ValueError(
                    f"input constant multiplies by scale and takes only position and scale; got also {', '.join(extra)}"
                )
            if self.scale == 1.0:
                raise ValueError("input constant with scale 1.0 changes nothing; the half-scale control is scale: 0.5")
        return self


class ValidationConfig(Frozen):
    """How often, and on how much of the validation split, the loss is measured."""

    slice_bytes: Count = 32_768
    points: Count = 4
    """Evaluations on the slice, evenly spaced over the schedule; the last one is at its end."""
    full_at_end: bool = False
    """Once more on the whole validation split when the trial ends."""
    slice_documents: Count | None = None
    """At most so many validation documents, evenly spaced, give a head to the slice; None: all of them."""


class BlendMember(Frozen):
    """One corpus of a blend, and its share of the training sequences, relative to the other members' weights."""

    corpus: str
    weight: Positive
    corpus_sha256: str = ""


class ValidationSet(Frozen):
    """One more corpus that the loss is measured on, beside the validation split of ``data.corpus``."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,14}$")]
    """In records: ``NAME`` for its slice, ``NAME/full`` for the whole."""
    corpus: str
    validation_every: Count | None = None
    """Which documents count, as in ``data``, whose value None stands for; 1 takes all of a corpus that was held out."""
    corpus_sha256: str = ""


class DataConfig(Frozen):
    """The corpora and how they are cut into tokens. The hashes and the vocabulary are filled in by the plan."""

    corpus: str = "sotu"
    """``sotu`` (built in), a .jsonl file (also .gz, .xz, .bz2, .zst) with a ``text`` field a line, or a folder that
    ``gatesweep data prepare`` made. Its validation split is what verdicts are about."""
    blend: Annotated[tuple[BlendMember, ...], BeforeValidator(_as_tuple)] = Field(
        default=(),
        description="a list such as [{corpus: a.jsonl, weight: 0.7}, {corpus: b.jsonl, weight: 0.3}], each corpus once",
    )
    """What is trained on in place of ``corpus`` alone: the members' training splits, in exact proportions."""
    tokenizer: str = "bytes"
    """``bytes`` (built in, 256 tokens), or the path of a Hugging Face tokenizer.json, a SentencePiece .model, or a
    .tiktoken file of BPE ranks."""
    sequence_length: Count = 256
    separate_documents: bool = False
    """A token attends only within its own document. False packs documents: attention runs over their ends."""
    validation_every: Annotated[int, BeforeValidator(_integral), Field(ge=2)] = 20
    """Document i (0-based) is validation when i % validation_every == validation_every - 1."""
    validation: ValidationConfig = ValidationConfig()
    padded_vocab_size: Count | None = None
    """Rows of the embedding, at least the tokenizer's tokens: so that tensor ranks divide them, or as published."""
    validation_sets: Annotated[tuple[ValidationSet, ...], BeforeValidator(_as_tuple)] = Field(
        default=(),
        description="a list such as [{name: books, corpus: books.jsonl, validation_every: 1}], each name once, "
        "of at most 15 of a-z, 0-9, _ and -",
    )
    """Measured whenever ``corpus`` is, recorded beside it; no verdict looks at them."""
    vocab_size: Count = 256
    corpus_sha256: str = ""
    tokenizer_sha256: str = ""

    @model_validator(mode="after")
    def _each_once(self) -> DataConfig:
        corpora = [member.corpus_sha256 or member.corpus for member in self.blend]
        if twice := next((m.corpus for m, c in zip(self.blend, corpora, strict=True) if corpora.count(c) > 1), None):
            raise ValueError(f"blend has the corpus {twice} more than once; allowed: one member a corpus")
        names = [one.name for one in self.validation_sets]
        if wrong := next((name for name in names if names.count(name) > 1 or name in ("slice", "full")), None):
            raise ValueError(
                f"validation_sets: the name {wrong!r} is taken; allowed: each name once, and neither slice nor full"
            )
        return self


class TrainConfig(Frozen):
    """AdamW, its schedule and its budget. Batches and budgets are in tokens."""

    tokens: Count
    batch_tokens: Count
    lr: Positive
    min_lr_fraction: Fraction = 0.1
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """``wsd``: warm-up, stable, then linear decay over the last ``decay_fraction``."""
    warmup_fraction: Fraction = 0.1
    decay_fraction: Fraction = 0.2
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Never applied to norms, biases and input-independent gates."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    epsilon: Positive = 1e-8
    clip_gradient_norm: Positive = 1.0

    @property
    def num_steps(self) -> int:
        """Optimizer steps; the last batch may go past ``tokens``, never short of it."""
        return -(-self.tokens // self.batch_tokens)

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainConfig:
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1.0:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} + decay_fraction {self.decay_fraction} must not exceed 1"
            )
        return self


class FP8Config(Frozen):
    """How precision ``fp8`` scales the operands of matrix products; weights are kept in bf16 and fp32."""

    recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """Of Transformer Engine: one scale a tensor, from its present or its past maximum (``delayed``), one a block of
    128 x 128 or 1 x 128 (``blockwise``), or one for 32 values (``mxfp8``; Blackwell only)."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """``hybrid``: E4M3 forward, E5M2 for gradients."""

    @property
    def multiple(self) -> int:
        """What every dimension of a matrix product must be a multiple of: the kernel's alignment, or the block."""
        return {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}[self.recipe]


class TrialConfig(Frozen):
    """Everything that decides a trial's numbers: a cell and a seed."""

    model: ModelConfig
    gate: GateConfig | None = None
    more_gates: Annotated[tuple[GateConfig, ...], BeforeValidator(_as_tuple)] = Field(
        default=(), description="a list of gates such as [{position: value}], each at a position of its own"
    )
    data: DataConfig = DataConfig()
    train: TrainConfig
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    fp8: FP8Config | None = None
    """Only with precision ``fp8``, and filled in there."""
    seed: Annotated[int, BeforeValidator(_integral), Field(ge=0, lt=2**32)]
    """What NumPy's generator takes: Megatron shuffles the samples with it."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_fp8(cls, values: Any) -> Any:
        """A recipe by default and the same one by name are one trial, with one fingerprint."""
        if isinstance(values, dict) and values.get("precision") == "fp8" and values.get("fp8") is None:
            return {**values, "fp8": {}}
        return values

    @model_validator(mode="after")
    def _fp8_is_used(self) -> TrialConfig:
        if self.fp8 is not None and self.precision != "fp8":
            raise ValueError(f"fp8 needs precision fp8, not {self.precision}")
        return self

    @model_validator(mode="after")
    def _batch_holds_sequences(self) -> TrialConfig:
        if self.train.batch_tokens % self.data.sequence_length:
            raise ValueError(
                f"train.batch_tokens {self.train.batch_tokens:,} must be a multiple of "
                f"data.sequence_length {self.data.sequence_length:,}"
            )
        return self

    @model_validator(mode="after")
    def _one_gate_a_position(self) -> TrialConfig:
        positions = [gate.position for gate in self.gates]
        if len(set(positions)) < len(positions):
            raise ValueError(f"two gates at one position: {', '.join(positions)}; allowed: one gate a position")
        if self.more_gates and self.gate is None:
            raise ValueError("more_gates needs gate: give the first gate there")
        return self

    @property
    def gates(self) -> tuple[GateConfig, ...]:
        """All gates, in the order of POSITIONS: the order in which a file names them changes nothing."""
        named = self.more_gates if self.gate is None else (self.gate, *self.more_gates)
        return tuple(sorted(named, key=lambda gate: POSITIONS.index(gate.position)))

    @property
    def batch_sequences(self) -> int:
        return self.train.batch_tokens // self.data.sequence_length

    def validation_steps(self) -> tuple[int, ...]:
        """The optimizer steps after which the validation slice is measured, ascending."""
        return evenly_spaced(self.train.num_steps, self.data.validation.points)

    def canonical_json(self) -> str:
        """What the fingerprint covers: hashes stand for the files, so a moved corpus is the same trial.

        What is absent or off is left out, so that a mechanism that is added later changes no earlier fingerprint.
        """
        content = self.model_dump(mode="json", exclude={"more_gates"})
        if self.more_gates:
            # The order in which a file names the gates changes nothing.
            content["gate"] = [gate.model_dump(mode="json") for gate in self.gates]
        if self.data.corpus_sha256:
            del content["data"]["corpus"]
        for name in ("blend", "validation_sets"):
            content["data"][name] = [_hash_for_path(one) for one in content["data"][name]]
        if self.data.tokenizer_sha256:
            del content["data"]["tokenizer"]
        return json.dumps(_without_absent({"numerics": NUMERICS, **content}), sort_keys=True, separators=(",", ":"))

    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal for equal trials on every machine."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:16]


class DiagnosticsConfig(Frozen):
    """How often an attempt looks inside its model, and on how much. It changes no other number: no fingerprint."""

    points: Annotated[int, BeforeValidator(_integral), Field(ge=0)] = 4
    """Probes, evenly spaced over the schedule, the last one at its end; 0: none."""
    sequences: Count = 1
    """Of the validation slice's first windows, the same for every probe."""
    histogram_bins: Annotated[int, BeforeValidator(_integral), Field(ge=2)] = 20
    """Of the gate scores."""

    def steps(self, num_steps: int) -> tuple[int, ...]:
        """The optimizer steps that are probed, ascending."""
        return evenly_spaced(num_steps, self.points)


def evenly_spaced(num_steps: int, points: int) -> tuple[int, ...]:
    """At most ``points`` of the steps 1 to ``num_steps``, ascending; the last is ``num_steps``. None for 0 points."""
    points = min(points, num_steps)
    return tuple(sorted({max(1, round(num_steps * i / points)) for i in range(1, points + 1)}))


def _hash_for_path(corpus: dict[str, Any]) -> dict[str, Any]:
    dropped = "corpus" if corpus["corpus_sha256"] else "corpus_sha256"
    return {key: value for key, value in corpus.items() if value is not None and key != dropped}


def _without_absent(content: dict[str, Any]) -> dict[str, Any]:
    kept = {key: _without_absent(value) if isinstance(value, dict) else value for key, value in content.items()}
    return {
        key: value for key, value in kept.items() if value is not None and value is not False and value not in ([], {})
    }


Backend = Literal["auto", "local", "transformer_engine"]
"""Whose modules a model is made of: Megatron's own, or Transformer Engine's; ``auto``: the latter on CUDA, if it can be
imported. Not part of the fingerprint: the two agree to rounding (bf16 and fp32; fp8 has only the one)."""


class Layout(Frozen):
    """How an attempt is spread over ranks, and what it computes twice to save memory. Not part of the fingerprint.

    Every layout gives the same numbers but for rounding. Ranks are ordered tensor, context, data, pipeline: those
    that differ in tensor alone are adjacent.
    """

    tensor: Count = 1
    """Ranks over which the heads, the FFN and the vocabulary are cut."""
    pipeline: Count = 1
    """Stages of consecutive layers."""
    virtual_pipeline: Count = 1
    """Model chunks a stage (Megatron's interleaved schedule): more communication, less idling."""
    expert: Count = 1
    """Ranks over which whole experts are dealt out; they are ranks of tensor x context x data, not further ones."""
    context: Count = 1
    """Ranks over which a sequence is cut, attention included."""
    data: Count = 1
    """Copies of all of this, each of which takes its share of the batch."""
    sequence_parallel: bool = False
    """Between its matrix products, a layer keeps 1/tensor of the sequence on each of the tensor ranks."""
    distributed_optimizer: bool = False
    """Each data-parallel rank keeps and moves its part of the optimizer's state. On CUDA it is so in any case."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed anew in the backward pass: none, those of core attention, or all but each layer's input."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def expert_tensor(self) -> int:
        """Ranks over which one expert is cut: experts are either cut like the other layers, or dealt out whole."""
        return self.tensor if self.expert == 1 else 1
