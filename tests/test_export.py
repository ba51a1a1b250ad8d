"""Models as Hugging Face folders: what each form can express, and that a folder is read whole or refused.

That an exported model computes what ours does is proven in test_parity.py.
"""

import json
import math

import pytest
import torch
from bench.parity import ELEMENTWISE, EXPERTS, HEADWISE, exported, our_logits
from oracle import relative_error
from safetensors.torch import load_file, save_file
from small_trials import SMALL, build, small_batch, small_trial

from models import accounting, export
from models.config import GateConfig, MoEConfig
from models.export import folder as folders
from models.export import forms
from models.export.read_config import read_config
from models.export.weights import weights, zeros

PLAIN = SMALL.model_copy(update={"qk_norm": False})
UNTIED = SMALL.model_copy(update={"tied_embeddings": False, "rope_base": 1e6, "norm_epsilon": 1e-5})
TOP_1 = EXPERTS.model_copy(update={"moe": MoEConfig(num_experts=3, top_k=1)})
ALLOWED = [
    ("qwen3-next", small_trial(ELEMENTWISE)),
    ("qwen3-next", small_trial(ELEMENTWISE, UNTIED)),
    ("qwen3-next", small_trial(ELEMENTWISE, EXPERTS)),
    ("released", small_trial(ELEMENTWISE)),
    ("released", small_trial(HEADWISE, UNTIED)),
    ("released", small_trial(HEADWISE, PLAIN)),
    ("released", small_trial(None, PLAIN)),
    ("qwen3", small_trial(None)),
    ("qwen3", small_trial(None, TOP_1)),
]
SMALLEST = small_trial(ELEMENTWISE, SMALL.model_copy(update={"num_layers": 1}))


def shape(architecture):
    """What must come back from config.json; coefficients of the router's losses are of training."""
    model = architecture.model
    if model.moe is not None:
        model = model.model_copy(update={"moe": (model.moe.num_experts, model.moe.top_k)})
    return model, architecture.gate, architecture.vocab_size, architecture.context, architecture.separator


# -- forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "trial"), ALLOWED)
def test_a_config_is_read_as_it_was_written(form, trial):
    written = export.architecture_of(trial, form, separator=7)
    read = read_config(json.loads(json.dumps(forms.config_json(written, "float32"))), "config.json")
    assert shape(read) == shape(written)
    assert read.form == form
    assert read.not_understood == ()


@pytest.mark.parametrize(
    ("form", "gate", "model", "reason"),
    [
        ("released", GateConfig(position="value"), SMALL, "gate.position value"),
        ("qwen3-next", GateConfig(position="sdpa", activation="silu"), SMALL, "gate.activation silu"),
        ("released", GateConfig(position="sdpa", combine="additive"), SMALL, "gate.combine additive"),
        ("released", GateConfig(position="sdpa", sharing="head_shared"), SMALL, "gate.sharing head_shared"),
        ("released", GateConfig(position="sdpa", input="none"), SMALL, "gate.input none"),
        ("released", GateConfig(position="sdpa", input="constant", scale=0.5), SMALL, "gate.scale 0.5"),
        ("qwen3-next", GateConfig(position="sdpa", scale=2.0), SMALL, "gate.scale 2.0"),
        ("qwen3-next", GateConfig(position="sdpa", init="open"), SMALL, "no offset"),
        ("qwen3-next", HEADWISE, SMALL, "format released takes it"),
        ("qwen3-next", None, SMALL, "format qwen3 takes it"),
        ("qwen3-next", ELEMENTWISE, PLAIN, "qk_norm false"),
        ("qwen3", None, PLAIN, "format released takes it"),
        ("qwen3", ELEMENTWISE, SMALL, "Qwen3 has no gate"),
        ("released", ELEMENTWISE, EXPERTS, "format qwen3-next has"),
        ("released", None, EXPERTS, "format qwen3 has"),
        ("released", None, SMALL.model_copy(update={"sandwich_norm": True}), "model.sandwich_norm"),
        ("qwen3", None, SMALL.model_copy(update={"softmax_sink": True}), "model.softmax_sink"),
        ("qwen3", None, SMALL.model_copy(update={"sdpa_output": "silu"}), "model.sdpa_output silu"),
    ],
)
def test_what_a_form_cannot_express_is_refused_by_name(form, gate, model, reason):
    with pytest.raises(export.Refused, match=reason):
        export.architecture_of(small_trial(gate, model), form, separator=0)


def test_gates_at_two_places_are_refused():
    trial = small_trial(ELEMENTWISE).model_copy(update={"more_gates": (GateConfig(position="value"),)})
    with pytest.raises(export.Refused, match="gates at 2 places"):
        export.architecture_of(trial, "released", separator=0)


def test_a_mechanism_that_this_code_does_not_know_is_refused(monkeypatch):
    """One that is added to ModelConfig later, by whoever does not think of exports."""
    monkeypatch.setattr(forms, "_MODEL_FIELDS", forms._MODEL_FIELDS - {"qk_norm"})
    with pytest.raises(export.Refused, match=r"model\.qk_norm False"):
        export.architecture_of(small_trial(None, PLAIN), "released", separator=0)


RELEASED = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen3.Qwen3ForCausalLM"},
    "bos_token_id": 151643,
    "elementwise_attn_output_gate": False,
    "eos_token_id": 151643,
    "head_dim": 128,
    "headwise_attn_output_gate": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "qkv_bias": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "use_qk_norm": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
"""Of the shape that the paper gives for its released models; the three differ in flags and FFN width."""


@pytest.mark.parametrize(
    ("changes", "granularity", "millions"),
    [
        ({}, None, 1720.8),
        ({"headwise_attn_output_gate": True}, "headwise", 1721.8),
        ({"elementwise_attn_output_gate": True, "intermediate_size": 5504}, "elementwise", 1728.2),
    ],
)
def test_the_released_checkpoints_have_the_published_sizes(changes, granularity, millions):
    """Counted twice: in closed form, and over the tensors that the folder must hold."""
    architecture = read_config(RELEASED | changes, "config.json")
    assert (architecture.gate.granularity if architecture.gate else None) == granularity
    assert architecture.not_understood == ()
    count = accounting.parameters(architecture.model, architecture.gate, architecture.vocab_size)
    assert round(count / 1e6, 1) == millions
    tensors = [shape for weight in weights(architecture) for shape in weight.published.values()]
    assert sum(map(math.prod, tensors)) == count


NEXT = forms.config_json(export.architecture_of(small_trial(ELEMENTWISE), "qwen3-next", 0), "float32")
NEXT_MOE = forms.config_json(export.architecture_of(small_trial(ELEMENTWISE, EXPERTS), "qwen3-next", 0), "float32")


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        (RELEASED, {"model_type": "llama"}, "model_type is 'llama', allowed are qwen3"),
        (RELEASED, {"quantization_config": {"bits": 4}}, "quantised"),
        (RELEASED, {"hidden_act": "gelu"}, "SwiGLU"),
        (RELEASED, {"attention_bias": True}, "no bias"),
        (RELEASED, {"qkv_bias": True}, "no bias"),
        (RELEASED, {"use_sliding_window": True}, "whole sequence"),
        (RELEASED, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "plain RoPE"),
        (RELEASED, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "plain RoPE"),
        (RELEASED, {"headwise_attn_output_gate": True, "elementwise_attn_output_gate": True}, "both true"),
        (RELEASED, {"num_attention_heads": 12}, "must be a multiple of num_kv_heads"),
        (RELEASED, {"head_dim": None}, "head_dim must be a positive integer, got None"),
        (RELEASED, {"vocab_size": "152064"}, "vocab_size must be a positive integer, got '152064'"),
        (RELEASED, {"rms_norm_eps": "1e-6"}, "norm_epsilon: Input should be a valid number"),
        (RELEASED, {"eos_token_id": "<|endoftext|>"}, "eos_token_id must be an integer"),
        (RELEASED, {"layer_types": ["full_attention"] * 27}, "27 entries for num_hidden_layers 28"),
        (NEXT, {"layer_types": ["linear_attention", "full_attention"]}, "only full_attention is built"),
        (NEXT, {"layer_types": None}, "only full_attention is built"),
        (NEXT, {"partial_rotary_factor": 0.25, "rope_parameters": None}, "whole head dimension"),
        (NEXT, {"mlp_only_layers": [0], "num_experts": 8, "shared_expert_intermediate_size": 1}, "mlp_only_layers"),
        (NEXT_MOE, {"shared_expert_intermediate_size": 512}, "shared experts are not built"),
        (NEXT_MOE, {"norm_topk_prob": False}, "sum to one"),
        (NEXT_MOE, {"decoder_sparse_step": 2}, "in every layer"),
        (NEXT_MOE, {"num_experts_per_tok": 9}, "must not exceed num_experts"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_with_the_reason(config, changes, reason):
    with pytest.raises(export.Refused, match=f"config.json: .*{reason}"):
        read_config(config | changes, "config.json")


def test_of_several_separators_the_first_is_taken():
    assert read_config(RELEASED | {"eos_token_id": [151645, 151643]}, "c").separator == 151645
    assert read_config(RELEASED | {"eos_token_id": None}, "c").separator is None


def test_a_key_that_is_not_known_is_told():
    assert read_config(RELEASED | {"logit_softcap": 30.0}, "c").not_understood == ("logit_softcap",)


# -- folders --------------------------------------------------------------------------------------------------


def imported(directory, trial):
    """The folder in a freshly drawn model."""
    opened = export.open_folder(directory)
    model = build(trial.model_copy(update={"seed": 99}))
    export.load_into(model, opened)
    return opened, model


@pytest.mark.parametrize(("form", "trial"), ALLOWED)
def test_export_import_export_is_the_same_bytes(world, tmp_path, form, trial):
    original, architecture = exported(trial, form, tmp_path / "first")
    opened, model = imported(tmp_path / "first", trial)
    assert shape(opened.architecture) == shape(architecture)
    export.write_folder(tmp_path / "second", architecture, model, tokenizer={}, provenance={})
    for name in ("config.json", "generation_config.json", "model.safetensors", "gatesweep.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left
    tokens, _ = small_batch()
    assert relative_error(our_logits(model, tokens), our_logits(original, tokens)) < 1e-6


def test_who_may_read_the_config_may_read_the_weights(world, tmp_path):
    exported(SMALLEST, "released", tmp_path / "model")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_shards_hold_what_one_file_holds(world, tmp_path):
    model, architecture = exported(small_trial(ELEMENTWISE), "released", tmp_path / "one")
    export.write_folder(
        tmp_path / "many", architecture, model, tokenizer={}, provenance={}, shard_bytes=4 * 32 * 48 * 2
    )
    assert not (tmp_path / "many" / "model.safetensors").exists()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    one = load_file(tmp_path / "one" / "model.safetensors")
    opened = export.open_folder(tmp_path / "many")
    assert index["weight_map"].keys() == one.keys() == opened.files.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert all(torch.equal(opened.tensor(name), tensor) for name, tensor in one.items())


def test_a_stored_bf16_keeps_its_numbers_in_an_fp32_model(world, tmp_path):
    trial = small_trial(ELEMENTWISE)
    model, architecture = exported(trial, "released", tmp_path / "fp32")
    export.write_folder(tmp_path / "bf16", architecture, model.bfloat16(), tokenizer={}, provenance={})
    opened, loaded = imported(tmp_path / "bf16", trial)
    assert opened.dtype is torch.bfloat16
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, weight in loaded.named_parameters():
        assert weight.dtype is torch.float32
        assert torch.equal(weight, dict(model.named_parameters())[name].float()), name


def test_a_folder_with_something_in_it_is_left_alone(world, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(export.Refused, match="exists and is not empty"):
        exported(SMALLEST, "released", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def changed(tensors):
    """(what is done to the tensors of a folder, what the message names)"""
    tensors = dict(tensors)
    yield {name: one for name, one in tensors.items() if name != Q_PROJ}, rf"missing {Q_PROJ} \[64, 32\]"
    yield tensors | {"model.layers.1.extra": torch.zeros(3)}, r"unexpected model\.layers\.1\.extra \[3\]"
    yield tensors | {Q_PROJ: tensors[Q_PROJ][:40].clone()}, rf"{Q_PROJ} is \[40, 32\], config.json makes it \[64, 32\]"
    yield tensors | {Q_PROJ: tensors[Q_PROJ].to(torch.int8)}, f"{Q_PROJ} is I8, allowed are F32"
    yield tensors | {Q_PROJ: tensors[Q_PROJ] * math.nan}, f"tensor {Q_PROJ} holds numbers that are not finite"
    different = tensors["model.embed_tokens.weight"] + 1
    yield tensors | {"lm_head.weight": different}, "lm_head.weight differs from model.embed_tokens.weight"


@pytest.mark.parametrize("number", range(6))
def test_a_tensor_that_does_not_fit_is_named(world, tmp_path, number):
    exported(SMALLEST, "released", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors, said = list(changed(load_file(path)))[number]
    save_file(tensors, path)
    with pytest.raises(export.Refused, match=said):
        imported(tmp_path / "model", SMALLEST)


def test_a_tied_matrix_may_be_stored_twice(world, tmp_path):
    original, _ = exported(SMALLEST, "released", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    _, model = imported(tmp_path / "model", SMALLEST)
    tokens, _ = small_batch()
    assert torch.equal(our_logits(model, tokens), our_logits(original, tokens))


def test_a_shared_expert_that_does_something_is_refused(world, tmp_path):
    trial = small_trial(ELEMENTWISE, EXPERTS)
    _, architecture = exported(trial, "qwen3-next", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in zeros(architecture) if name.endswith("down_proj.weight"))
    save_file(tensors | {name: tensors[name] + 1}, path)
    with pytest.raises(export.Refused, match=f"{name} is not zero"):
        imported(tmp_path / "model", trial)


def test_only_whole_safetensors_are_read(world, tmp_path):
    exported(SMALLEST, "released", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(export.Refused, match="not a whole safetensors file"):
        export.open_folder(tmp_path / "model")
    path.rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(export.Refused, match=r"pytorch_model\.bin is not read: a pickle can run code"):
        export.open_folder(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(export.Refused, match=r"config\.json: not JSON"):
        export.open_folder(tmp_path / "model")
    with pytest.raises(export.Refused, match=r"has no config\.json"):
        export.open_folder(tmp_path)
    with pytest.raises(export.Refused, match="is not a folder"):
        export.open_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "../model.safetensors"}, "is not the name of a .safetensors file"),
        ({"a": "other.safetensors"}, "lacks other.safetensors"),
        ({"a": 3}, "expected weight_map"),
        (None, "expected weight_map"),
    ],
)
def test_an_index_names_files_of_the_folder(world, tmp_path, weight_map, said):
    exported(SMALLEST, "released", tmp_path / "model")
    (tmp_path / "model" / folders.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(export.Refused, match=said):
        export.open_folder(tmp_path / "model")


def test_a_tensor_in_two_files_is_refused(world, tmp_path):
    exported(SMALLEST, "released", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({Q_PROJ: load_file(path)[Q_PROJ]}, tmp_path / "model" / "again.safetensors")
    weight_map = {"a": "model.safetensors", "b": "again.safetensors"}
    (tmp_path / "model" / folders.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(export.Refused, match=rf"{Q_PROJ} is in again\.safetensors and in model\.safetensors"):
        export.open_folder(tmp_path / "model")


# -- the byte tokenizer ---------------------------------------------------------------------------------------

TEXTS = [
    "The gate opens.",
    " two  spaces\t\r\n\n and a line ",
    "Ā ā Ġ Ċ: letters that byte-level tokenizers use themselves",
    "\ufeff\u2028\u0301 e\u0301 é ﬁ Å",
    "漢字 слово 🤦🏽‍♀️ \U0010ffff",
    "<|endoftext|></s><s>[CLS]<0x00>",
    "".join(map(chr, range(1, 0x180))),
    "",
]


def test_the_byte_tokenizer_gives_the_bytes_in_tokenizers_and_in_transformers(world, tmp_path):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    model, architecture = build(SMALLEST), export.architecture_of(SMALLEST, "qwen3-next", separator=0)
    files = {"tokenizer.json": export.byte_tokenizer_json().encode()}
    export.write_folder(tmp_path / "model", architecture, model, tokenizer=files, provenance={})
    plain = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    automatic = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert plain.get_vocab_size() == len(automatic) == 256
    for text in TEXTS:
        ids = list(text.encode())
        assert plain.encode(text).ids == ids, text
        assert plain.decode(ids, skip_special_tokens=False) == text
        assert automatic(text).input_ids == ids, text
        assert automatic.decode(ids) == text
