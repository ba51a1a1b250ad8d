"""What a model does inside, by layer: measured now and then while it trains, and on any built model. The face.

- ``first_token``: how much attention goes to the first token, from queries and keys
- ``probe``: one forward pass, watched: attention, activations, gate scores, output norms
- ``updates``: gradient norms, and how far an optimizer step moves the weights
"""

from models.diagnostics.probe import probe
from models.diagnostics.updates import UpdateWatch

__all__ = ["UpdateWatch", "probe"]
"""``updates`` needs a training step; ``probe`` any GPTModel of ``layer_specs``, or its pipeline chunks."""
