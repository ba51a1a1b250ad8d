"""The fused gate against its plain torch form: in Triton's interpreter here, on a CUDA device where there is one.

Run as a script, this file is the other process that Triton needs: TRITON_INTERPRET is read when a kernel is
decorated, and a build for another machine's GPU must not have it. It writes what the kernels gave to a file; the
tests compare.
"""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from oracle import relative_error

from models import gates
from models.config import GateConfig

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (torch's CPU builds come without it)"
)


@dataclass(frozen=True)
class Case:
    """A gate on tensors laid out as ``models.attention`` has them. Sizes are (S, B, G, Q, D)."""

    gate: dict = field(default_factory=dict)
    sizes: tuple[int, int, int, int, int] = (5, 2, 2, 3, 24)
    signal_dtype: torch.dtype = torch.float32
    logits_dtype: torch.dtype = torch.float32
    gradient: str = "contiguous"

    @property
    def config(self):
        return GateConfig(**{"position": "sdpa", "scale": 1.75, **self.gate})


HEADWISE = {"granularity": "headwise"}
BF16 = {"signal_dtype": torch.bfloat16, "logits_dtype": torch.bfloat16}
ACTIVATIONS = [
    {"granularity": granularity, "activation": activation, "combine": combine}
    for granularity in ("elementwise", "headwise")
    for activation in gates.ACTIVATIONS
    for combine in ("multiplicative", "additive")
]
CASES = {
    **{" ".join(gate.values()): Case(gate) for gate in ACTIVATIONS},
    "open": Case({"init": "open"}),
    "bf16": Case(**BF16),
    "bf16 headwise": Case(HEADWISE, **BF16),
    "bf16 additive silu": Case({"combine": "additive", "activation": "silu"}, **BF16),
    "bf16 signal, fp32 logits": Case(signal_dtype=torch.bfloat16),
    "fp32 signal, bf16 logits": Case(HEADWISE, logits_dtype=torch.bfloat16),
    "whole tiles": Case(sizes=(8, 2, 2, 2, 128), **BF16),
    "whole tiles, headwise": Case(HEADWISE, sizes=(8, 2, 2, 2, 128), **BF16),
    "odd sizes": Case(sizes=(7, 3, 1, 5, 50)),
    "odd sizes, headwise": Case(HEADWISE, sizes=(7, 3, 5, 1, 50)),
    "one sequence": Case(sizes=(33, 1, 2, 2, 24), **BF16),
    "one position, one head": Case(HEADWISE, sizes=(1, 1, 1, 1, 2)),
    "wide heads": Case(sizes=(3, 1, 2, 1, 300)),
    "wide heads, headwise": Case(HEADWISE, sizes=(3, 1, 2, 1, 300)),
    "value": Case({"position": "value"}, **BF16),
    "value, headwise": Case({"position": "value", **HEADWISE}),
    "dense": Case({"position": "dense"}, sizes=(5, 2, 2, 3, 40), **BF16),
    "parameter": Case({"input": "none"}),
    "parameter, headwise": Case({"input": "none", **HEADWISE}),
    "gradient of another layout": Case({"position": "value"}, gradient="permuted"),
    "gradient of a sum": Case(HEADWISE, gradient="expanded"),
}


def inputs(case, device="cpu"):
    """(leaves, signal, logits, gradient of the output), the same in every process."""
    draw = torch.Generator().manual_seed(1)

    def leaf(*shape, dtype=case.signal_dtype):
        return torch.randn(shape, generator=draw).to(device, dtype).requires_grad_()

    s, b, g, q, d = case.sizes
    gate = case.config
    heads = q if gate.position != "value" else 1
    width = d if gate.granularity == "elementwise" else 1
    if gate.position == "dense":
        leaves = {"signal": leaf(s, b, g * q * d), "logits": leaf(s, b, g * q * d, dtype=case.logits_dtype)}
        signal, logits = leaves.values()
    else:
        # Each group's block of the fused projection: [queries | gate | key | value].
        mixed = leaf(s, b, g, q * d + heads * width + 2 * d, dtype=case.logits_dtype)
        _, logits, _, value = torch.split(mixed, [q * d, heads * width, d, d], dim=3)
        leaves = {"mixed": mixed, "signal": leaf(s, b, g * q, d)}
        signal, logits = leaves["signal"], logits.unflatten(3, (heads, width))
        if gate.position == "value":
            signal = value
        if gate.input == "none":
            leaves["parameter"] = leaf(g * heads, width, dtype=case.logits_dtype)
            logits = leaves["parameter"].expand(s, b, g * heads, width)
    gradient = torch.randn(signal.shape, generator=draw).to(device, signal.dtype)
    if case.gradient == "permuted":
        gradient = gradient.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    elif case.gradient == "expanded":
        gradient = gradient.new_tensor(0.75).expand(signal.shape)
    return leaves, signal, logits, gradient


def plain(gate, signal, logits):
    logits = logits.flatten(2, 3) if logits.dim() == 5 else logits
    return gates.apply(gate, signal, gates.scores(gate, logits, lambda scores: scores.mean(dim=2, keepdim=True)))


def values_and_gradients(gated, case, device="cpu"):
    leaves, signal, logits, gradient = inputs(case, device)
    output = gated(case.config, signal, logits)
    gradients = torch.autograd.grad(output, list(leaves.values()), gradient, allow_unused=True)
    found = {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_agrees(ours, reference, tolerance):
    """fp32 to ``tolerance``; bf16 to one unit in the last place, for Triton's interpreter truncates."""
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        assert ours[name].dtype == expected.dtype, name
        if expected.dtype == torch.float32:
            assert relative_error(ours[name], expected) < tolerance, name
            continue
        assert ours[name].shape == expected.shape, name
        ours_fp32, expected = ours[name].float(), expected.float()
        last_place = torch.exp2(torch.frexp(expected)[1] - 8.0) * (expected != 0)
        assert ((ours_fp32 - expected).abs() <= last_place + tolerance * expected.abs().max()).all(), name


# -- in Triton's interpreter --------------------------------------------------------------------------------------


def child(task, folder, **environment):
    """What ``task`` returns in a Python of its own."""
    path = folder / f"{task}.pt"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    paths = os.pathsep.join([str(Path(gates.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, __file__, task, str(path)],
        env={**inherited, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return child("interpret", tmp_path_factory.mktemp("interpret"), TRITON_INTERPRET="1")


def interpret():
    from models import kernels

    config, signal, logits = Case().config, *inputs(Case())[1:3]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda tensor: tensor):
        kernels.gated(config, signal, logits)
    return {
        "cases": {name: values_and_gradients(kernels.gated, case) for name, case in CASES.items()},
        "slopes": {name: slopes(kernels.gated, Case(gate)) for name, gate in SLOPES.items()},
        "kept": sorted(kept) == sorted([signal.data_ptr(), logits.data_ptr()]),
        "supported": {name: kernels.supports(*inputs_of) for name, inputs_of in supports_inputs().items()},
    }


SLOPES = {" ".join(gate.values()): gate for gate in ACTIVATIONS}


def slopes(gated, case, step=0.01):
    """Directional derivatives of a gate: by its backward pass, and by central differences of its forward pass."""
    leaves, signal, logits, gradient = inputs(case)
    draw = torch.Generator().manual_seed(2)
    directions = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in leaves.items()}
    output = gated(case.config, signal, logits)
    gradients = torch.autograd.grad(output, list(leaves.values()), gradient)
    exact = sum((g.double() * d).sum() for g, d in zip(gradients, directions.values(), strict=True))
    sums = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, tensor in leaves.items():
                tensor.add_(directions[name], alpha=sign * step)
            sums.append((gated(case.config, signal, logits).double() * gradient).sum())
    return exact.item(), ((sums[0] - sums[1]) / (2 * step)).item()


def supports_inputs():
    """Name -> (gate, signal, logits); names that begin with ``no`` are for the plain form."""
    gate, headwise, shared = GateConfig(position="sdpa"), GateConfig(position="sdpa", **HEADWISE), "head_shared"
    signal, logits = torch.zeros(5, 2, 6, 16), torch.zeros(5, 2, 2, 3, 16)
    return {
        "grouped": (gate, signal, logits),
        "ungrouped": (gate, signal, signal),
        "headwise": (headwise, signal, logits[..., :1]),
        "without heads": (GateConfig(position="dense"), signal[0], signal[0]),
        "no shared heads": (GateConfig(position="sdpa", sharing=shared), signal, logits),
        "no constant": (GateConfig(position="sdpa", input="constant", scale=0.5), signal, logits),
        "no doubles": (gate, signal.double(), logits),
        "no half logits": (gate, signal, logits.half()),
        "no other device": (gate, signal, logits.to("meta")),
        "no other heads": (gate, signal, logits[:, :, :1]),
        "no other length": (gate, signal, logits[:1]),
        "no other width": (gate, signal, logits[..., :8]),
        "no huge heads": (headwise, torch.zeros(1, 1, 1, 2048), torch.zeros(1, 1, 1, 1)),
        "no bare vectors": (gate, signal[0, 0], signal[0, 0]),
    }


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_fused_gate_is_the_plain_one(interpreted, name):
    assert_agrees(interpreted["cases"][name], values_and_gradients(plain, CASES[name]), tolerance=1e-6)


@needs_triton
@pytest.mark.parametrize("name", SLOPES)
def test_its_gradients_are_slopes_of_its_values(interpreted, name):
    exact, differences = interpreted["slopes"][name]
    assert abs(exact) > 1.0
    assert exact == pytest.approx(differences, rel=1e-3)


@needs_triton
def test_only_signal_and_logits_are_kept_for_the_backward_pass(interpreted):
    assert interpreted["kept"]


@needs_triton
def test_what_is_not_fused_is_left_to_the_plain_form(interpreted):
    assert interpreted["supported"] == {name: not name.startswith("no ") for name in supports_inputs()}


# -- without the interpreter --------------------------------------------------------------------------------------


def test_on_the_cpu_the_plain_form_is_used():
    from models import kernels

    assert not any(kernels.supports(*arguments) for arguments in supports_inputs().values())


def test_without_triton_the_module_imports_and_supports_nothing(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("models.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    kernels = importlib.import_module("models.kernels")
    assert not kernels.available()
    assert not kernels.supports(*supports_inputs()["grouped"])


# -- built for Hopper, with no GPU --------------------------------------------------------------------------------

PAPER = (64, 2, 4, 4, 128)
BUILDS = {
    "bf16": Case(sizes=PAPER, **BF16),
    "fp32": Case(sizes=PAPER),
    "bf16 headwise": Case(HEADWISE, sizes=PAPER, **BF16),
    "fp32 headwise": Case(HEADWISE, sizes=PAPER),
    "bf16 value": Case({"position": "value"}, sizes=PAPER, **BF16),
    "bf16 dense": Case({"position": "dense"}, sizes=PAPER, **BF16),
    "bf16 silu": Case({"activation": "silu"}, sizes=PAPER, **BF16),
    # One gate row leaves a group's block an odd number of rows: no vector fits the values.
    "unaligned": Case({"position": "value", **HEADWISE}, sizes=PAPER, **BF16),
}


class Hopper:
    """What Triton asks of a driver before it compiles; nothing is launched."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def build():
    """Case -> kernel -> {ptx, registers, ...}, of the very launches that ``gated`` makes."""
    import triton

    from models import kernels

    built = {}
    triton.runtime.driver.set_active(Hopper())
    run = triton.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        built[kernel.__name__.removeprefix("_gate_")] = {"ptx": compiled.asm["ptx"], **resources(compiled.asm["cubin"])}

    triton.JITFunction.run = compile_only
    found = {}
    for name, case in BUILDS.items():
        values_and_gradients(kernels.gated, case)
        found[name], built = built, {}
    return found


def resources(cubin):
    import triton

    path = Path(sys.argv[2]).with_suffix(".cubin")
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return child("build", tmp_path_factory.mktemp("build"))


def accesses(ptx, kind):
    """Width -> number of loads ("ld") or stores ("st") of global memory, as in {"v4.b32": 4}."""
    return Counter(re.findall(rf"{kind}\.global\.((?:v\d\.)?b\d+)", ptx))


DIRECTIONS = ("forward", "backward")


@needs_triton
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", BUILDS)
def test_on_hopper_it_spills_nothing_and_leaves_room_for_many_warps(built, name, direction):
    kernel = built[name][direction]
    assert ".target sm_90" in kernel["ptx"]
    assert kernel["STACK"] == kernel["LOCAL"] == 0
    assert 16 <= kernel["REG"] <= 48, "more than 48 of 65,536 registers a thread leave fewer than 40 warps of 64"


@needs_triton
@pytest.mark.parametrize("name", [name for name in BUILDS if name != "unaligned"])
def test_on_hopper_it_moves_16_bytes_at_a_time(built, name):
    headwise = BUILDS[name].config.granularity == "headwise"
    for direction, num_read, num_written in (("forward", 2, 1), ("backward", 3, 2)):
        loads, stores = (accesses(built[name][direction]["ptx"], kind) for kind in ("ld", "st"))
        # 32 bytes a thread and tensor; of a headwise gate's logits, one for each of the two rows it touches.
        assert loads.pop("v4.b32") == 2 * (num_read - headwise)
        assert stores.pop("v4.b32") == 2 * (num_written - (headwise and direction == "backward"))
        assert loads.total() == (2 if headwise else 0)
        assert stores.total() == (1 if headwise and direction == "backward" else 0)


@needs_triton
def test_unaligned_slices_are_seen_to_be_read_one_by_one(built):
    assert accesses(built["unaligned"]["forward"]["ptx"], "ld") == {"b16": 16 + 2}


@needs_triton
@pytest.mark.parametrize("name", BUILDS)
def test_its_sums_use_no_atomics(built, name):
    for direction in DIRECTIONS:
        assert not re.search(r"\b(atom|red)\.", built[name][direction]["ptx"])


# -- on a CUDA device ---------------------------------------------------------------------------------------------


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_on_cuda_the_fused_gate_is_the_plain_one(cuda, name):
    from models import kernels

    case = CASES[name]
    assert kernels.supports(case.config, *inputs(case, cuda)[1:3])
    ours = values_and_gradients(kernels.gated, case, cuda)
    # The device's exponential and division are approximate in the last two bits.
    assert_agrees(ours, values_and_gradients(plain, case, cuda), tolerance=5e-6)
    again = values_and_gradients(kernels.gated, case, cuda)
    assert all(torch.equal(again[key], tensor) for key, tensor in ours.items())


def test_the_bandwidth_script_says_that_it_needs_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gate_bandwidth.py"])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        runpy.run_path(str(Path(__file__).parent / "bench" / "gate_bandwidth.py"), run_name="__main__")


if __name__ == "__main__":
    torch.save({"interpret": interpret, "build": build}[sys.argv[1]](), sys.argv[2])
