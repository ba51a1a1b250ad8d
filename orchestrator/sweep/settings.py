"""What a sweep is, once read: frozen, checked, still unexpanded. Every option here does something.

``base`` and ``arms`` hold nested config values that are checked one by one but not yet as a whole: only a cell has a
whole config, and making cells is the plan's work.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator

from models.config import Count, DiagnosticsConfig, Frozen, Integer, Positive
from orchestrator.sweep.budget import BudgetConfig
from orchestrator.sweep.document import Places
from orchestrator.sweep.gate_rule import PromoteConfig
from orchestrator.sweep.notices import NoticesConfig
from orchestrator.sweep.pruning import PruneConfig
from orchestrator.sweep.rates import ExtendedRates, GrowingRates, SearchedRates
from orchestrator.sweep.resources import ResourcesConfig, as_tuple

Seed = Annotated[Integer, Field(ge=0, le=2**31 - 1)]
"""As far as every random generator of the stack takes it (numpy's is the narrowest)."""


ArmName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,79}$", description="letters, digits, - and _, at most 80")
]
"""No dots, so that an override can name an arm: ``arms.g1.gate.init=zero``."""


NUM_PARAMETERS = "model.num_parameters"


class Derived(Frozen):
    """``{of: PATH, times: NUMBER, power: NUMBER}``: times x source^power, of another config field of the same cell.

    ``of: model.num_parameters`` is no field: the size of the cell before its arm, without embeddings and gates.
    """

    of: str
    times: float
    power: float = 1.0

    def __str__(self) -> str:
        return f"{self.times:g} times {self.of}" + ("" if self.power == 1.0 else f" to the power {self.power:g}")


class MatchConfig(Frozen):
    """What gated arms have in common with their ungated twin; the FFN width gives way, as in the paper."""

    by: Literal["none", "parameters", "flops"] = "none"
    ffn_multiple: Count | None = None
    """The width stays a multiple of this; None: 128 for models of hidden size 1024 and more, else 2."""

    @model_validator(mode="after")
    def _multiple_is_used(self) -> MatchConfig:
        if self.by == "none" and self.ffn_multiple is not None:
            raise ValueError("ffn_multiple needs by: parameters or by: flops")
        return self


class AllocateConfig(Frozen):
    """Confirming seeds go, look by look, to the arms that are still undecided; those that are settled stop."""

    method: Literal["obrien-fleming"] = "obrien-fleming"
    """Group-sequential: how ``alpha`` is spent over the looks, and with it when an arm is settled."""
    seeds_per_look: Count = 2
    """More for every undecided arm from one look to the next, and for the baseline by its share."""


class VerdictConfig(Frozen):
    """How arms are judged: declared before anything runs, and frozen at the first submission."""

    margin: Positive | None = None
    """Differences in nats a token below this count as none; None: nothing is called equivalent."""
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Chance that any arm is called better or worse without being so, over all arms and all declared looks."""
    method: Literal["dunnett", "welch", "auto"] = "dunnett"
    """One variance for all arms, or each pair's own; ``auto`` lets Bartlett's test choose."""
    paired: bool = False
    """The same seed in two arms shares its noise, and the share is taken off."""
    tail: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """The last share of the schedule whose validations are averaged into a trial's loss."""
    looks: Annotated[Integer, Field(ge=1, le=20)] = 1
    """How often verdicts are read, counting every larger set of seeds as one more."""
    allocate: AllocateConfig | None = None
    """None: every arm gets the seeds that the sweep names, and no more."""
    promote: PromoteConfig | None = None
    """Which arms of a ladder go on to the next rung, by their verdict on the one below; None: all of them."""

    @model_validator(mode="after")
    def _looks_can_be_taken(self) -> VerdictConfig:
        if self.allocate is None:
            return self
        if self.looks == 1:
            raise ValueError("allocate with looks 1: one look settles all arms at once; allowed: looks of 2 or more")
        if self.paired:
            raise ValueError("allocate with paired: settled arms have fewer seeds, so pairs fall apart; allowed: false")
        if self.method == "auto":
            raise ValueError("allocate with method auto: it would choose anew at each look; allowed: dunnett, welch")
        return self

    @model_validator(mode="after")
    def _gates_can_be_read(self) -> VerdictConfig:
        if self.promote is None:
            return self
        if self.allocate is not None:
            said = "arms that are let through late would have missed looks; allowed: one of the two"
            raise ValueError(f"promote with allocate: {said}")
        if self.margin is None and "equivalent" in (*self.promote.unless, *self.promote.when):
            raise ValueError("promote by equivalent: without a margin nothing is called so; allowed: a margin")
        return self

    @model_validator(mode="after")
    def _pairs_have_no_arms_variances(self) -> VerdictConfig:
        if self.paired and self.method == "auto":
            raise ValueError("method auto tests the arms' own variances, which pairing has none of; name the method")
        return self


Control = Literal["half-scale", "wider-ffn", "more-kv-heads", "more-query-heads", "more-experts"]

CountsAs = Literal["infrastructure", "error", "never_again", "nothing"]
"""The retry budget that an end is charged to; ``never_again`` fails at once, ``nothing`` is retried uncounted."""


def compile_pattern(text: str) -> Any:
    """An RE2 expression: linear in time, so that no log can hang the controller. ValueError if it is none."""
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(text, options)
    except re2.error as error:
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise ValueError(f"{text!r} is no RE2 pattern: {reason}") from error


def _checked_pattern(text: str) -> str:
    compile_pattern(text)
    return text


Pattern = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_checked_pattern)]


class FailureRule(Frozen):
    """An end with this evidence has this cause. Every kind of evidence that is given must match."""

    cause: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$", description="lower-case letters, digits and _")]
    error: Pattern | None = None
    """RE2, searched in the error that a rank raised, or that Ray told of a dead one: ``Class: message``."""
    log: Pattern | None = None
    """RE2, searched in the last 16 KiB of the failed rank's log."""
    exit_code: Annotated[Integer, Field(ge=0, le=255)] | None = None
    counts_as: CountsAs = "infrastructure"
    host_faults: Annotated[Integer, Field(ge=0)] = 0
    """What it weighs against the host of the failed rank; at 2 the sweep uses the host no more."""

    @model_validator(mode="after")
    def _looks_at_something(self) -> FailureRule:
        if self.error is None and self.log is None and self.exit_code is None:
            raise ValueError(f"rule for cause {self.cause} looks at nothing; allowed: error, log, exit_code")
        return self


class RetryConfig(Frozen):
    """Attempts beside the first one, by cause, and when a cause is seen."""

    infrastructure: Annotated[Integer, Field(ge=0)] = 5
    error: Annotated[Integer, Field(ge=0)] = 0
    backoff_seconds: Annotated[float, Field(ge=0.0)] = 1.0
    """Before the first retry; it doubles with every further one, up to five minutes."""
    hang_seconds: Positive = 900.0
    """A gang is hung when it has done nothing for so long, and for ``hang_steps`` of its usual steps."""
    hang_steps: Positive = 20.0
    rules: Annotated[tuple[FailureRule, ...], BeforeValidator(as_tuple)] = Field(
        default=(), description="a list of rules such as [{cause: stale_nfs, log: Stale file handle}]"
    )


class CheckpointConfig(Frozen):
    every_steps: Count | None = None
    """None: ten times over the schedule."""
    keep: Count = 2
    final: bool = True
    """One more at the end of the schedule: what a finished trial is exported and measured from."""

    def steps_between(self, num_steps: int) -> int:
        """Checkpoints of a trial of so many steps."""
        return self.every_steps or -(-num_steps // 10)

    def num_kept(self, num_steps: int) -> int:
        """Of a complete trial."""
        whole, rest = divmod(num_steps, self.steps_between(num_steps))
        return min(self.keep, whole + (self.final and rest > 0))


class Settings(Frozen):
    """The keys of a sweep file that are no grammar of cells."""

    name: Annotated[
        str,
        Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,79}$", description="lower-case letters, digits, - and _, at most 80"),
    ]
    question: Annotated[str, Field(min_length=1, description="text, not empty")]
    match: MatchConfig = MatchConfig()
    order_seed: Integer = 0
    """Draws the order of the trials within a block."""
    baseline_seeds: Count | None = None
    """Seeds of the baseline; None: sqrt(other arms) times those of an arm, rounded; as many when paired, or when an
    arm has a single one. Confirming ones, where there are some."""
    controls: Annotated[tuple[Control, ...], BeforeValidator(as_tuple)] = Field(
        default=("half-scale",), description=f"a list of {', '.join(get_args(Control))}, or [] for none"
    )
    """Arms that join by themselves. ``half-scale``: the baseline with its attention output halved, as a fresh sigmoid
    gate does, beside arms with gates. The others: the baseline made larger by the parameters of the dearest gates."""
    verdict: VerdictConfig = VerdictConfig()
    prune: PruneConfig = PruneConfig()
    resources: ResourcesConfig = ResourcesConfig()
    retry: RetryConfig = RetryConfig()
    budget: BudgetConfig = BudgetConfig()
    notices: NoticesConfig = NoticesConfig()
    priority: Annotated[Integer, Field(ge=-1000, le=1000)] = 0
    """Among sweeps that share a store and a Ray cluster; ``gatesweep set`` changes it while the sweep runs."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    diagnostics: DiagnosticsConfig | None = DiagnosticsConfig()
    """None: not at all."""


class Sweep(Settings):
    """One question. Dotted names (``train.lr``) are config paths; lists of values are in file order."""

    base: dict[str, Any]
    baseline: str
    arms: dict[str, dict[str, Any]]
    axes: dict[str, tuple[Any, ...] | Derived | SearchedRates | ExtendedRates] = Field(default_factory=dict)
    zip: tuple[dict[str, tuple[Any, ...]], ...] = ()
    rows: tuple[dict[str, Any], ...] = ()
    exclude: tuple[dict[str, Any], ...] = ()
    seeds: tuple[Seed, ...]
    """Every cell runs once a seed."""
    confirm_seeds: tuple[Seed, ...] = ()
    """Those of the verdicts, at each arm's best learning rate, which ``seeds`` only choose. Without any, ``seeds`` do
    both."""
    sized_controls: tuple[str, ...] = ()
    """Arms that joined as controls and get their size in each cell; so far they set what the baseline does."""
    extra_baseline_seeds: tuple[Seed, ...] = ()
    """More seeds for the baseline, which every verdict of the sweep leans on: for all its cells, or confirming ones."""
    text: str = ""
    """The file as it was read."""
    overrides: tuple[str, ...] = ()
    path: str = ""
    """Absolute; relative paths in the file start at its folder."""
    _places: Places = PrivateAttr(default_factory=Places)

    @property
    def places(self) -> Places:
        """Where the values stand in the file; only a sweep that was read from one knows."""
        return self._places

    @property
    def growing_rates(self) -> GrowingRates | None:
        """How learning rates join the grid while the sweep runs; None: all of them are written in the file."""
        axis = self.axes.get("train.lr")
        return axis if isinstance(axis, SearchedRates | ExtendedRates) else None

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Every config path that varies besides the arm, in file order: axes, then zip, then rows."""
        names = [*self.axes, *(name for group in self.zip for name in group), *(n for row in self.rows for n in row)]
        return tuple(dict.fromkeys(names))
