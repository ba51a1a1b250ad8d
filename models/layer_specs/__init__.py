"""From configs to Megatron: ``build_model`` makes a trial's GPTModel, gates and all."""

from models.layer_specs.build import build_model, num_parameters

__all__ = ["build_model", "num_parameters"]
