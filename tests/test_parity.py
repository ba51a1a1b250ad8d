"""Our numbers are those of code that others wrote: the proofs of bench/parity.py within their bounds."""

import pytest
from bench.parity import PROOFS

TOLERANCE = 1e-5


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: f"{proof.name} / {proof.against}")
def test_outputs_and_gradients_are_the_others(world, proof):
    found = proof.measure()
    assert found.outputs < TOLERANCE, found
    assert found.gradients < TOLERANCE, found
