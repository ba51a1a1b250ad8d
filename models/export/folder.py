"""A published model's folder: written whole or not at all, read with every tensor accounted for.

    config.json  generation_config.json  tokenizer.json  tokenizer_config.json  gatesweep.json (where it came from)
    model.safetensors, or model-00001-of-00002.safetensors ... and model.safetensors.index.json

Tensors are read and written one of ours at a time, so that memory holds one model and not two.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.export.forms import Architecture, Refused, config_json
from models.export.read_config import read_config
from models.export.weights import Shape, Weight, weights, zeros
from models.run_dir import write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


# -- writing ------------------------------------------------------------------------------------------------------


def write_folder(
    directory: Path,
    architecture: Architecture,
    model: nn.Module,
    *,
    tokenizer: Mapping[str, bytes],
    provenance: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model`` (the whole of it, on one rank) in the architecture's form, in the dtype that it has.

    ``tokenizer`` are files beside it, name -> content; ``provenance`` is gatesweep.json.
    Raises Refused when ``directory`` is there and not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise Refused(f"{directory} exists and is not empty; name a new folder")
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    paired = list(weights(architecture))
    assert named.keys() == {weight.ours for weight in paired}, named.keys() ^ {weight.ours for weight in paired}
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    aside.mkdir()
    try:
        _write_tensors(aside, architecture, paired, named, shard_bytes)
        dtype = str(named[paired[0].ours].dtype).removeprefix("torch.")
        write_json(aside / "config.json", config_json(architecture, dtype))
        separator = architecture.separator
        write_json(aside / "generation_config.json", {"bos_token_id": separator, "eos_token_id": separator})
        for name, content in tokenizer.items():
            (aside / name).write_bytes(content)
        if "tokenizer.json" in tokenizer:
            write_json(aside / "tokenizer_config.json", _tokenizer_config(architecture))
        write_json(aside / "gatesweep.json", provenance)
        aside.replace(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _tokenizer_config(architecture: Architecture) -> dict[str, Any]:
    """The class is named, or transformers would take the one of the model's family and its own way to cut text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": architecture.context,
    }


def _write_tensors(
    aside: Path, architecture: Architecture, paired: list[Weight], named: Mapping[str, Tensor], shard_bytes: int
) -> None:
    shards = _shards(paired, named, shard_bytes)
    placed: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        tensors = {name: part for one in shard for name, part in one.to_published(named[one.ours]).items()}
        if number == len(shards):
            dtype = named[paired[0].ours].dtype
            tensors |= {name: torch.zeros(shape, dtype=dtype) for name, shape in zeros(architecture).items()}
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # format: what transformers asks of a file before it reads it.
        path = aside / name
        path.touch()
        permissions = path.stat().st_mode
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(permissions)  # safetensors leaves the file to its owner alone, also in a folder that others read
        placed |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _shards(paired: list[Weight], named: Mapping[str, Tensor], shard_bytes: int) -> list[list[Weight]]:
    """Weights in order, cut where a file would pass ``shard_bytes``."""
    shards: list[list[Weight]] = [[]]
    filled = 0
    for weight in paired:
        size = named[weight.ours].nbytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += size
    return shards


# -- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublishedFolder:
    """A folder whose config.json was understood and whose tensors are all there, in the shapes that it says."""

    directory: Path
    architecture: Architecture
    files: Mapping[str, Path]
    """Tensor name -> the file that holds it."""
    dtype: torch.dtype
    """Of the embedding."""

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def open_folder(directory: Path) -> PublishedFolder:
    """Look at a folder without reading a weight. Raises Refused for what it lacks, has too much, or cannot be."""
    if not directory.is_dir():
        raise Refused(f"{directory} is not a folder")
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise Refused(f"{directory} has no config.json")
    architecture = read_config(_read_object(config_path), str(config_path))
    files: dict[str, Path] = {}
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    for path in _safetensors(directory):
        for name, shape, dtype in _content(path):
            if name in files:
                raise Refused(f"{directory}: tensor {name} is in {files[name].name} and in {path.name}")
            files[name], shapes[name], dtypes[name] = path, shape, dtype
    _check(directory, architecture, shapes, dtypes)
    return PublishedFolder(directory, architecture, files, DTYPES[dtypes[EMBEDDING]])


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise Refused(f"{path}: expected an object, got {type(content).__name__}")
    return content


def _safetensors(directory: Path) -> list[Path]:
    """The files of the model: the index's, or the only one."""
    index = directory / INDEX
    if not index.is_file():
        if (directory / SINGLE).is_file():
            return [directory / SINGLE]
        other = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        found = f"; {', '.join(other)} is not read: a pickle can run code, convert it to safetensors" if other else ""
        raise Refused(f"{directory} has neither {SINGLE} nor {INDEX}{found}")
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise Refused(f"{index}: expected weight_map, an object of tensor name -> file name")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise Refused(f"{index}: {name!r} is not the name of a .safetensors file in the folder")
        if not (directory / name).is_file():
            raise Refused(f"{directory} lacks {name}, which {INDEX} names")
    return [directory / name for name in names]


def _content(path: Path) -> Iterator[tuple[str, Shape, str]]:
    """(name, shape, dtype) of a file's tensors, from its header."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 -- no mapping, it has keys() only
                part = file.get_slice(name)
                yield name, tuple(part.get_shape()), part.get_dtype()
    except SafetensorError as error:
        raise Refused(f"{path}: not a whole safetensors file: {error}") from error


def _check(directory: Path, architecture: Architecture, shapes: Mapping[str, Shape], dtypes: Mapping[str, str]) -> None:
    expected = {name: shape for weight in weights(architecture) for name, shape in weight.published.items()}
    expected |= zeros(architecture)
    if architecture.model.tied_embeddings and LM_HEAD in shapes:
        expected[LM_HEAD] = expected[EMBEDDING]  # some save the tied matrix twice
    problems = [f"missing {name} {list(expected[name])}" for name in expected if name not in shapes]
    problems += [f"unexpected {name} {list(shapes[name])}" for name in shapes if name not in expected]
    for name, shape in shapes.items():
        if name in expected and shape != expected[name]:
            problems.append(f"{name} is {list(shape)}, config.json makes it {list(expected[name])}")
        if dtypes[name] not in DTYPES:
            problems.append(f"{name} is {dtypes[name]}, allowed are {', '.join(DTYPES)}")
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise Refused(f"{directory}: the tensors do not fit config.json: {'; '.join(problems[:NAMED])}{more}")


NAMED = 8
"""Tensors named in one message."""


@torch.no_grad()
def load_into(model: nn.Module, folder: PublishedFolder) -> None:
    """Fill ``model`` (built from the folder's architecture, on one rank) in its own dtype.

    Raises Refused for a tensor that is not finite, and for weights that the built model has no place for.
    """
    named = dict(model.named_parameters())
    paired = list(weights(folder.architecture))
    assert named.keys() == {weight.ours for weight in paired}, named.keys() ^ {weight.ours for weight in paired}
    for weight in paired:
        published = {name: folder.tensor(name) for name in weight.published}
        for name, tensor in published.items():
            if not torch.isfinite(tensor).all():
                raise Refused(f"{folder.files[name]}: tensor {name} holds numbers that are not finite")
        target = named[weight.ours]
        target.copy_(weight.to_ours(published, target.dtype))
    for name in zeros(folder.architecture):
        if "down_proj" in name and folder.tensor(name).any():
            raise Refused(f"{folder.files[name]}: {name} is not zero: shared experts are not built here")
    tied = folder.architecture.model.tied_embeddings
    if tied and LM_HEAD in folder.files and not torch.equal(folder.tensor(LM_HEAD), folder.tensor(EMBEDDING)):
        raise Refused(f"{folder.files[LM_HEAD]}: {LM_HEAD} differs from {EMBEDDING}, and config.json ties them")
