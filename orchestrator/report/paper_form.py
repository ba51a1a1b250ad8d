"""Verdict tables as a paper prints them: LaTeX (booktabs), and Parquet for a notebook.

Intervals and numbers of seeds stand in the table, footnotes below it; nothing is bold: a rank without its interval
says too little.
"""

from __future__ import annotations

import io

from orchestrator.report.figures import NOTHING, axes_text, lr_text, perplexity_text
from orchestrator.report.formats import to_csv
from orchestrator.report.terminal import verdict_text
from orchestrator.report.tree import ArmRow, Results, VerdictTable

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "−": "$-$",
    }
)  # fmt: skip
_COLUMNS = (
    ("Arm", "l"), ("LR", "r"), ("+ Param (M)", "r"), ("PPL", "r"), (r"Loss (nats)", "r"), ("$n$", "r"),
    (r"$\Delta$ (nats)", "r"), ("Interval", "c"), ("Verdict", "l"),
)  # fmt: skip


def latex_text(text: str) -> str:
    """As plain text, on one line: nothing in a name or a note is a command."""
    return " ".join(text.translate(_LATEX).split())


def to_latex(results: Results) -> str:
    """A ``table`` environment for each combination of the axes' values; needs booktabs and the T1 font encoding."""
    return "\n".join(_environment(results, table) for table in results.tables)


def _environment(results: Results, table: VerdictTable) -> str:
    level = f"{1 - results.alpha:.0%}"
    caption = f"{results.sweep}: {results.question}" + (f" ({axes_text(dict(table.axes))})" if table.axes else "")
    baseline = next((row.num_parameters for row in table.rows if row.is_baseline), None)
    lines = [
        r"\begin{table}[t]",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{latex_text(caption)} Intervals: {latex_text(level)}.}}",
        rf"\begin{{tabular}}{{{''.join(align for _, align in _COLUMNS)}}}",
        r"\toprule",
        " & ".join(heading for heading, _ in _COLUMNS) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        lines.append(" & ".join(_cells(row, baseline)) + r" \\")
        if row.is_baseline and len(table.rows) > 1:
            lines.append(r"\midrule")
    lines += [r"\bottomrule", r"\end{tabular}", r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize"]
    lines += [rf"{latex_text(note)}\par" for note in table.footnotes]
    return "\n".join([*lines, r"\end{minipage}", r"\end{table}", ""])


def _cells(row: ArmRow, baseline_parameters: int | None) -> tuple[str, ...]:
    added = None
    if row.num_parameters is not None and baseline_parameters is not None and not row.is_baseline:
        added = (row.num_parameters - baseline_parameters) / 1e6
    spread = "" if row.loss_sd_nats is None else rf" $\pm$ {row.loss_sd_nats:.4f}"
    interval = NOTHING if row.low_nats is None else f"$[{row.low_nats:+.4f}, {row.high_nats:+.4f}]$"
    return (
        latex_text(row.arm),
        latex_text(lr_text(row.best_lr)),
        NOTHING if added is None else f"${added:.3g}$",
        latex_text(perplexity_text(row.perplexity)),
        NOTHING if row.loss_nats is None else f"{row.loss_nats:.4f}{spread}",
        str(len(row.losses_nats)),
        NOTHING if row.delta_nats is None else f"${row.delta_nats:+.4f}$",
        interval,
        latex_text(verdict_text(row)),
    )


def to_parquet(results: Results) -> bytes:
    """The lines and columns of ``to_csv``, with their types."""
    import pandas as pd

    frame = pd.read_csv(io.StringIO(to_csv(results)), keep_default_na=True)
    return bytes(frame.to_parquet(index=False))
