"""What Megatron-LM's training prints: a line every ``--log-interval`` iterations, and one a validation.

    [2026-01-05 10:00:00] iteration      100/     500 | consumed samples:  25600 | ... | lm loss: 2.912E+00 | ...
     validation loss at iteration 100 | lm loss value: 2.881E+00 | lm loss PPL: 1.783E+01 |

(``training_log`` and ``evaluate_and_print_results`` in megatron/training/training.py.) A resumed run prints iterations
again, and a log may hold both: the later line holds. The loss on the test split at the end is left alone.
"""

from __future__ import annotations

import re

from orchestrator.foreign.points import CurveMaker, ForeignText
from orchestrator.store import ImportedCurve

_STEP = re.compile(r"iteration +(\d+)/ *\d+ \|")
_LOSS = re.compile(r"\| +lm loss: +(\S+)")
_VALIDATION = re.compile(r"validation loss at iteration +(\d+)\b[^|]*\| +lm loss value: +(\S+)")


def looks_like_megatron(text: str) -> bool:
    return _STEP.search(text) is not None or _VALIDATION.search(text) is not None


def read_megatron(given: ForeignText) -> list[ImportedCurve]:
    maker = CurveMaker(given, repeats=True)
    for number, line in enumerate(given.text.splitlines(), start=1):
        step, loss, validation = _STEP.search(line), _LOSS.search(line), _VALIDATION.search(line)
        if validation is not None and "on test set" not in line:
            at = given.whole(number, "iteration", validation[1])
            maker.add(number, "validation", at, given.number(number, "lm loss value", validation[2]))
        elif step is not None and loss is not None:
            at = given.whole(number, "iteration", step[1])
            maker.add(number, "training", at, given.number(number, "lm loss", loss[1]))
    return maker.made()
