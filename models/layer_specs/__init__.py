"""From configs to Megatron: ``build_chunks`` makes this rank's part of a trial's GPTModel, gates and all."""

from models.layer_specs.build import build_chunks, build_model, num_parameters

__all__ = ["build_chunks", "build_model", "num_parameters"]
