"""What ``gatesweep diagnose`` found in a trained model, for a terminal. The figures come from ``models.verbs``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.report.figures import NOTHING, count_text, loss_text


def measured_table(measured: Mapping[str, Any]) -> RenderableType:
    """One fact a line, then a row a layer and their mean; what was left out comes last."""
    facts = list(_facts(measured))
    width = max(len(name) for name, _ in facts)
    return Group(
        *(Text(f"{name:{width}}  {value}") for name, value in facts),
        Text(f"\nby layer, on the first {measured['probe_sequences']} sequences:\n"),
        _layers(measured["diagnostics"]),
        *(Text(f"note: {note}") for note in measured["notes"]),
    )


def _facts(measured: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "trial" in measured:
        yield "trial", f"{measured['trial']}, step {measured['step']} of {measured['steps_planned']}"
    else:
        yield "folder", f"{measured['folder']} ({measured['format']}, {measured['stored_dtype']})"
    model = measured["model"]
    heads = f"{model['num_query_heads']}/{model['num_kv_heads']} heads of {model['head_dim']}"
    experts = f", {model['moe']['num_experts']} experts, top {model['moe']['top_k']}" if model["moe"] else ""
    yield "model", f"{model['num_layers']} layers x {model['hidden_size']}, {heads}, FFN {model['ffn_size']}{experts}"
    yield "gates", "; ".join(f"{gate['position']} {gate['granularity']}" for gate in measured["gates"]) or "none"
    yield "parameters", count_text(measured["num_parameters"])
    what = "validation split" if measured["split"] == "full" else "slice of the validation split"
    yield (
        "corpus",
        f"{measured['corpus']}, {what}: {measured['num_tokens']:,} tokens, {measured['num_bytes']:,} bytes, "
        f"{measured['sequence_length']:,} of context",
    )
    yield "loss", f"{loss_text(measured['loss_nats'])} nats a token"
    yield "bits/byte", loss_text(measured["bits_per_byte"])


_Numbers = Sequence[float | None]


def _layers(seen: Mapping[str, Any]) -> Table:
    """A row a layer, and their mean, which is what the paper's Table 4 gives of F-Attn, M-Act and score."""
    columns: dict[str, _Numbers] = {
        "F-Attn": [_mean(heads) for heads in seen["first_token_attention"]],
        "M-Act": seen["max_activation"],
        **{f"score {position}": scores["mean"] for position, scores in seen["gate_scores"].items()},
        "rms attention": seen["attention_output_rms"],
        "rms FFN": seen["ffn_output_rms"],
        "rms residual": seen["residual_rms"],
    }
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("layer", *columns):
        table.add_column(Text(heading, style="bold"), justify="right")
    for number, row in enumerate(zip(*columns.values(), strict=True), start=1):
        table.add_row(str(number), *map(_figure, row))
    table.add_row("mean", *(_figure(_mean(column)) for column in columns.values()), style="bold")
    return table


def _mean(values: _Numbers) -> float | None:
    """None when one is missing: a mean over the others would hide it."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
