"""Imported models compute what transformers computes; what is not just such a model is refused by name."""

import functools
import json
import os
import subprocess
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memorizing.errors import InputError
from memorizing.model.carry import empty_carry
from memorizing.model.transformer import abstract_model, apply_model
from memorizing.pretrained.config_json import ARCHITECTURES, read_config, write_config
from memorizing.pretrained.convert import by_path, places, to_tensor
from memorizing.pretrained.importing import read_pretrained
from memorizing.pretrained.tensors import Tensors
from memorizing.shapes import Batch
from tests.pretrained_folder import tensors, write_folder

REFERENCE = Path(os.environ.get("REFERENCE") or Path(__file__).parents[2] / ".reference/bin/python")
EACH = 20


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Made by transformers, with its logits."""
    if not REFERENCE.exists():
        assert "REFERENCE" not in os.environ, f"REFERENCE={REFERENCE}: there is no such interpreter"
        pytest.skip("needs PyTorch and transformers: bash tests/reference/setup.sh")
    folder = tmp_path_factory.mktemp("checkpoints")
    script = Path(__file__).parents[1] / "reference/checkpoints.py"
    subprocess.run([REFERENCE, script, folder, f"--each={EACH}"], check=True, capture_output=True, timeout=500)
    return folder


@pytest.mark.parametrize("name", [f"{family}-{number:02}" for family in ("gpt2", "llama") for number in range(EACH)])
def test_logits_equal_those_of_transformers_and_export_returns_its_tensors(checkpoints, name):
    """One segment; of Llama also the second one's first token, whose XL cache is the whole text before it."""
    folder = checkpoints / name
    expected = np.load(folder / "expected.npz")
    tokens = expected["tokens"].astype(np.int32)
    length = tokens.shape[1] if name.startswith("gpt2") else tokens.shape[1] // 2
    read = read_pretrained(folder, (), [], ["Model.dtype = 'float32'", f"Batch.segment_length = {length}"])
    model, memory = read.experiment.model, read.experiment.memory
    run = jax.jit(functools.partial(apply_model, abstract_model(model, memory)[0]))
    carry, found = empty_carry(model, memory, len(tokens), length), []
    for first in range(0, tokens.shape[1], length):
        part = tokens[:, first : first + length]
        batch = Batch(part, part, np.ones(part.shape, bool), np.full(len(part), first == 0))
        logits, carry = run(read.parameters, batch, carry)
        found.append(logits)
    compared = slice(length if name.startswith("gpt2") else length + 1)
    logits = np.concatenate(found, axis=1)[:, compared]
    np.testing.assert_allclose(logits, expected["logits"][:, compared], atol=1e-4, rtol=0)
    assert np.abs(logits).max() > 1  # they are no zeros

    # And back: the same tensors, and a config that says the same.
    architecture = ARCHITECTURES[read.architecture]
    leaves = jax.device_get(by_path(read.parameters))
    again = {place.tensor: to_tensor(place, leaves) for place in places(architecture, read.parameters)}
    original = {}
    for path in folder.glob("*.safetensors"):
        original |= load_file(path) if "BF16" not in path.read_bytes()[:2000].decode("latin1") else {}
    original = original or {name: Tensors(folder).read(name) for name in Tensors(folder).names}
    assert again.keys() == original.keys()
    for tensor, values in original.items():
        np.testing.assert_array_equal(again[tensor], values.astype(np.float32))
    settings = read_config(json.loads((folder / "config.json").read_text()), "")[1]
    rewritten = read_config(write_config(architecture, model), "")[1]
    windowed = {"max_positions"} if read.architecture == "mistral" else set()
    assert {n: v for n, v in rewritten.items() if n not in windowed} == {
        n: v for n, v in settings.items() if n not in windowed
    }


def read(folder: Path, *bindings: str, memory_layers=()):
    return read_pretrained(folder, memory_layers, [], ["Batch.segment_length = 32", *bindings])


def test_other_layouts_of_the_tensors_give_the_same_model(tmp_path):
    """Covers shards with an index, missing prefix, buffers, half precision, and a tied table stored twice."""
    own = {name: value.astype(np.float16).astype(np.float32) for name, value in tensors().items()}
    own["lm_head.weight"] = own["model.embed_tokens.weight"]
    tied = {"tie_word_embeddings": True}
    expected = jax.device_get(read(write_folder(tmp_path / "plain", tied, own)).parameters)
    bare = {name.removeprefix("model."): value for name, value in own.items() if name != "lm_head.weight"}
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    half = {name: value.astype(np.float16) for name, value in own.items()}
    for name, stored in {"bare": bare, "buffers": own | buffers, "half": half}.items():
        found = jax.device_get(read(write_folder(tmp_path / name, tied, stored)).parameters)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    folder = write_folder(tmp_path / "shards", tied, own)
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": list(own)[::2], "b.safetensors": list(own)[1::2]}
    for file, names in parts.items():
        save_file({name: own[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(read(folder).parameters), expected)
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"names b\.safetensors, which is not in that folder"):
        read(folder)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"x": np.ones(1)}, folder / "c.safetensors")
    with pytest.raises(InputError, match=r"2 safetensors files and no model\.safetensors\.index\.json"):
        read(folder)


def changed(name: str, value: np.ndarray | None) -> dict[str, np.ndarray]:
    own = tensors()
    if value is None:
        own.pop(name)
    else:
        own[name] = value
    return own


KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (changed(KEY, None), rf"the tensor {KEY} is missing"),
        (
            changed("model.layers.1.self_attn.k_proj.bias", np.ones(8, np.float32)),
            r"k_proj\.bias is not part of a llama",
        ),
        (changed("score.weight", np.ones((2, 16), np.float32)), r"score\.weight is not part"),
        (changed("model.layers.2.mlp.up_proj.weight", np.ones((24, 16), np.float32)), r"layers\.2\.mlp"),
        (changed(KEY, np.ones((16, 16), np.float32)), rf"{KEY} has shape \[16, 16\].* requires \[8, 16\]"),
        (changed(KEY, np.ones((16, 8), np.float32)), rf"{KEY} has shape \[16, 8\]"),
        (changed(KEY, np.ones((8, 16), np.int8)), rf"{KEY} is of I8\. Supported are F32, F16, BF16"),
        (changed(KEY, np.ones((8, 16), ml_dtypes.float8_e4m3fn)), rf"{KEY} is of F8_E4M3"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, own, message):
    with pytest.raises(InputError, match=message):
        read(write_folder(tmp_path / "folder", None, own))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma"}, "model_type = 'gemma': supported are llama, mistral, qwen2, qwen3, gpt2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM is supported"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping = 50\.0: it changes what the model computes"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map = .*: it changes what the model computes"),
        ({"num_local_experts": 8}, "num_local_experts = 8: it changes"),
        ({"num_hidden_layers": 10**9}, r"Model\.layers = 1000000000: must be at most 10,000"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn': supported are default, linear"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}},
            "beta_fast = 3: not a setting of rope_type",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "has no low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5: only 1\.0"),
        ({"num_hidden_layers": None}, "has no num_hidden_layers"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = 'two': has to be a whole number from 1"),
        ({"max_position_embeddings": 64.5}, r"max_position_embeddings = 64\.5: has to be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: has to be a whole number from 1"),
        ({"sliding_window": "a"}, "sliding_window = 'a': has to be a whole number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5': has to be a number above 0"),
        ({"rope_theta": True}, "rope_theta = True: has to be a number above 0"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear': has to have keys of its own"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "factor = 'x': has to be a number"),
        ({"mlp_bias": "yes"}, "mlp_bias = 'yes': has to be true or false"),
        ({"layer_types": 5}, "layer_types = 5: has to be a list of names"),
        ({"model_type": ["llama"]}, r"model_type = \['llama'\]: supported are"),
        ({"bos_token_id": True}, "bos_token_id = True is not the id of a token"),
        ({"num_key_value_heads": 3}, r"Model\.kv_heads = 3"),
        ({"sliding_window": 20}, r"segment_length = 32.*has Model\.max_positions = 20"),
        ({"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ({"bos_token_id": None, "eos_token_id": None}, "neither bos_token_id nor eos_token_id is in"),
        ({"bos_token_id": 299}, "the begin token 299 is not one of the 292 ids"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight differs from model\.embed_tokens\.weight"),
        ({"mlp_bias": True}, r"(?s)mlp\.down_proj\.bias.* and 3 more are missing"),
    ],
)
def test_unsupported_configs_are_refused_by_name(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        read(write_folder(tmp_path / "folder", config))


INERT = {
    "predict_special_tokens": True, "_num_labels": 1, "is_llama_config": True, "_attn_implementation_autoset": True,
    "unsloth_version": "2025.1", "transformers.js_config": {"dtype": "q4"}, "max_sequence_length": 2048,
    "pretraining_tp": 2, "_name_or_path": "x", "rope_interleaved": False,
}  # fmt: skip


def test_keys_that_change_nothing_are_ignored_and_unknown_ones_listed(tmp_path):
    """transformers ignores them, too: its config classes know none of the unknown ones."""
    plain = read(write_folder(tmp_path / "plain"))
    found = read(write_folder(tmp_path / "inert", INERT))
    assert found.remarks == plain.remarks and found.experiment == plain.experiment
    found = read(write_folder(tmp_path / "unknown", INERT | {"my_tool": {"a": 1}, "zeta": 0.5}))
    assert "keys of config.json without effect: my_tool, zeta" in found.remarks


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [KEY, "model.embed_tokens.weight"])
def test_tensors_that_are_not_finite_are_refused_by_name(tmp_path, name, value):
    own = tensors()
    own[name][3, 2] = value
    with pytest.raises(InputError, match=rf"the tensor {name} has 1 numbers that are NaN or infinite"):
        read(write_folder(tmp_path / "folder", None, own))


def test_a_tied_model_may_be_saved_under_the_name_of_its_head(tmp_path):
    own, tied = tensors(), {"tie_word_embeddings": True}
    own["lm_head.weight"] = own["model.embed_tokens.weight"]
    expected = jax.device_get(read(write_folder(tmp_path / "both", tied, own)).parameters)
    del own["model.embed_tokens.weight"]
    found = jax.device_get(read(write_folder(tmp_path / "head", tied, own)).parameters)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def with_tokens(folder: Path, *tokens: dict) -> Path:
    """Adds tokens to the tokenizer of a folder."""
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    described["added_tokens"] += [plain | token for token in tokens]
    path.write_text(json.dumps(described))
    return folder


def test_special_tokens_without_a_row_in_the_model_are_left_out(tmp_path):
    fillers = [{"id": id, "content": f"<|filler {id}|>"} for id in range(292, 300)]
    folder = with_tokens(write_folder(tmp_path / "padded"), *fillers, {"id": 300, "content": "<|pad|>"})
    found = read(folder)
    assert "tokens without a row in the model, which no text becomes: <|pad|>" in found.remarks
    assert found.vocabulary.size == 300 and found.vocabulary.encode("<|pad|>").max() < 300
    again = type(found.vocabulary)(found.vocabulary.model, found.vocabulary.begin, found.vocabulary.size)
    assert again.size == 300 and again.decode(again.encode("the cat")) == "the cat"
    word = {"id": 300, "content": "catalog", "special": False}
    folder = with_tokens(write_folder(tmp_path / "word"), *fillers, word)
    with pytest.raises(
        InputError, match=r"301 tokens, but the model only 300, and text becomes 'catalog'.*resize_token"
    ):
        read(folder)


def test_added_tokens_that_take_the_spaces_beside_them_are_reported(tmp_path):
    token = {"id": 292, "content": "<think>", "special": False, "lstrip": True, "rstrip": True}
    assert "spaces next to <think>" in read(with_tokens(write_folder(tmp_path / "folder"), token)).remarks[-1]


def test_the_begin_token_and_its_source_are_reported(tmp_path):
    assert (
        read(write_folder(tmp_path / "a")).remarks[0] == "documents begin with token 290 (bos_token_id of config.json)"
    )
    folder = write_folder(tmp_path / "b", {"bos_token_id": None})
    assert "token 291 (eos_token_id of config.json: the model has no begin token)" in read(folder).remarks[0]
    for bos in ("<|begin|>", {"content": "<|begin|>"}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos}))
        assert "token 290 (bos_token '<|begin|>' of tokenizer_config.json)" in read(folder).remarks[0]


def test_hostile_folders_are_refused_at_once(tmp_path):
    folder = with_tokens(write_folder(tmp_path / "far"), {"id": 4_000_000_000, "content": "<|far|>"})
    deep = write_folder(tmp_path / "deep")
    (deep / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    pipe = write_folder(tmp_path / "pipe")
    (pipe / "config.json").unlink()
    os.mkfifo(pipe / "config.json")
    for hostile, message in [
        (folder, r"'<\|far\|>' has the id 4000000000 in the file, but 292"),
        (deep, r"config\.json cannot be read"),
        (pipe, r"config\.json is not a file"),
    ]:
        start = time.process_time()
        with pytest.raises(InputError, match=message):
            read(hostile)
        assert time.process_time() - start < 2


def test_sliding_windows_without_effect_are_accepted(tmp_path):
    assert read(write_folder(tmp_path / "a", {"sliding_window": 33})).experiment.model.max_positions == 33
    full = {"sliding_window": 8, "layer_types": ["full_attention"] * 2}
    assert read(write_folder(tmp_path / "b", full)).experiment.model.max_positions == 64
    unused = {"sliding_window": 8, "use_sliding_window": False}
    assert read(write_folder(tmp_path / "c", unused)).experiment.model.max_positions == 64


def test_unsuitable_folders_are_refused(tmp_path):
    folder = write_folder(tmp_path / "folder")
    with pytest.raises(InputError, match=r"Model\.layers = 3, but the pretrained model has 2"):
        read(folder, "Model.layers = 3")
    with pytest.raises(InputError, match="Use --memory_layers"):
        read(folder, "Model.memory_layers = (1,)")
    (folder / "tokenizer.json").rename(folder / "kept")
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        read(folder)
    (folder / "kept").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-40])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        read(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin and no safetensors.*run code"):
        read(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        read(folder)
