"""A base model's shape is read from its files: parameters, what LoRA trains of them, sizes under their names."""

import json
import struct

import pytest

from bento_service.errors import InvalidRequest
from bento_service.training.model_shape import ModelShape, architecture_of
from bento_service.training.spec import LoraOptions, TrlOptions

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def write_header(folder, shapes, name="model.safetensors"):
    """A safetensors file without its data."""
    header = {key: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for key, shape in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.fixture
def folder(tmp_path):
    """An embedding of 100 x 8, one linear layer of 8 x 16, a norm of 8; in two files."""
    write_header(tmp_path, {"embed_tokens.weight": [100, 8], "norm.weight": [8]})
    write_header(tmp_path, {"layers.0.mlp.up_proj.weight": [16, 8]}, "model-2.safetensors")
    return tmp_path


def test_full_fine_tuning_trains_every_parameter_of_every_file(folder):
    shape = ModelShape.of(folder)
    assert shape.trained_parameters(TrlOptions(tuning="full")) == shape.parameters == 800 + 128 + 8
    assert shape.layer_parameters == 128


@pytest.mark.parametrize(
    ("lora", "trained"),
    [
        ({"rank": 4}, 4 * (16 + 8)),
        ({"rank": 4, "target_modules": ["up_proj"]}, 4 * (16 + 8)),
        ({"rank": 4, "target_modules": ["q_proj"]}, 0),
        ({"rank": 4, "use_dora": True}, 4 * (16 + 8) + 16),
    ],
)
def test_lora_trains_two_thin_matrices_a_linear_layer(folder, lora, trained):
    assert ModelShape.of(folder).trained_parameters(TrlOptions(lora=LoraOptions(**lora))) == trained


def test_a_real_model_and_adapter_have_as_many_parameters_as_counted(tmp_path):
    """Against transformers and peft, so that a new naming of layers is noticed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.tiny_model import make_tiny_model

    shape = ModelShape.of(make_tiny_model(tmp_path, kind="qwen3"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert shape.parameters == model.num_parameters()
    assert shape.architecture is not None and shape.architecture.normalized_queries
    for lora in (LoraOptions(rank=4), LoraOptions(rank=4, use_dora=True, target_modules=["q_proj", "down_proj"])):
        config = LoraConfig(r=4, target_modules=lora.target_modules, use_dora=lora.use_dora, task_type="CAUSAL_LM")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        assert shape.adapter_parameters(lora) == trained


def test_sizes_are_found_under_the_names_of_their_family():
    llama = architecture_of(LLAMA)
    assert llama is not None
    assert (llama.attention_width, llama.key_value_width, llama.intermediate) == (64, 32, 128)
    assert architecture_of({"text_config": LLAMA, "vision_config": {}}) == llama
    gpt2 = architecture_of({"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_inner": None})
    assert gpt2 is not None
    assert (gpt2.hidden, gpt2.intermediate, gpt2.key_value_width) == (64, 256, 64)
    experts = architecture_of({**LLAMA, "num_experts_per_tok": 8, "moe_intermediate_size": 48})
    assert experts is not None and experts.intermediate == 8 * 48
    assert architecture_of({"model_type": "llama"}) is None


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 3) + b"{}x", struct.pack("<Q", 2) + b"[]"])
def test_weights_that_are_none_are_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"model\.safetensors"):
        ModelShape.of(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "version https://git-lfs.github.com/spec/v1"])
def test_a_configuration_that_is_none_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InvalidRequest, match=r"config\.json"):
        ModelShape.of(tmp_path)
