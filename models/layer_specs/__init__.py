"""From configs to Megatron: ``build_chunks`` makes this rank's part of a trial's GPTModel, gates and all."""

from models.layer_specs.backend import Taken as Backend
from models.layer_specs.backend import choose as choose_backend
from models.layer_specs.build import build_chunks, build_model, num_parameters

__all__ = ["Backend", "build_chunks", "build_model", "choose_backend", "num_parameters"]
