"""Converts config.json of a Hugging Face folder to model settings, and back.

A key becomes a setting, must have the one supported value, or changes nothing (names, training, generation). Keys of
other architectures that change what a model computes are rejected if they are switched on. transformers ignores all
other keys; so does this module, and `memorizing import` lists them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from memorizing.errors import InputError
from memorizing.model.settings import ModelSettings
from memorizing.pretrained.tables import GPT2, LLAMA, TensorRow

_CHANGE_NOTHING = """
architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash
initializer_range use_cache attention_dropout attn_pdrop embd_pdrop resid_pdrop gradient_checkpointing
bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
id2label label2id num_labels problem_type task_specific_params n_ctx pretraining_tp reorder_and_upcast_attn
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
output_attentions output_hidden_states return_dict torchscript is_decoder attn_implementation _attn_implementation
max_length min_length do_sample num_beams temperature top_k top_p typical_p repetition_penalty length_penalty
diversity_penalty num_beam_groups num_return_sequences chunk_size_feed_forward encoder_no_repeat_ngram_size
no_repeat_ngram_size max_window_layers predict_special_tokens _num_labels is_llama_config max_sequence_length
_attn_implementation_autoset unsloth_version unsloth_fixed transformers.js_config rope_interleaved use_flash_attn
early_stopping num_beam_hypotheses bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id
forced_eos_token_id exponential_decay_length_penalty remove_invalid_values output_scores return_dict_in_generate
cross_attention_hidden_size finetuning_task tf_legacy_loss use_bfloat16 attention_probs_dropout_prob
"""
_INERT = frozenset(_CHANGE_NOTHING.split())
_CHANGE_FUNCTION = """
quantization_config compression_config auto_map pruned_heads is_encoder_decoder tie_encoder_decoder
num_local_experts num_experts num_experts_per_tok n_routed_experts moe_intermediate_size decoder_sparse_step
final_logit_softcapping attn_logit_softcapping query_pre_attn_scalar logits_scaling logit_scale embedding_multiplier
residual_multiplier attention_multiplier clip_qkv alibi no_rope_layers use_qk_norm qk_layernorm parallel_attn
sliding_window_pattern attention_chunk_size
"""
_REFUSED = frozenset(_CHANGE_FUNCTION.split())
"""Keys that change the function of some model; transformers acts on some of them for every architecture."""
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


class ConfigKeys:
    """Reads the keys of a config.json."""

    def __init__(self, config: Mapping[str, Any], source: str):
        self._left, self.source = dict(config), source

    def take(self, name: str, default: Any = ...) -> Any:
        """Returns a value; `default` if it is missing or null."""
        value = self._left.pop(name, None)
        if value is not None:
            return value
        if default is ...:
            raise InputError(
                f"{self.source} has no {name}: the config of this architecture needs it. Fetch the file again"
            )
        return default

    def count(self, name: str, default: Any = ...) -> int:
        """Returns an integer from 1; `default` if it is missing or null."""
        value = self.take(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            self.refuse(name, value, "has to be a whole number from 1")
        return value

    def number(self, name: str, default: Any = ...) -> float:
        """Returns a finite number above 0; `default` if it is missing or null."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.refuse(name, value, "has to be a number above 0")
        return float(value)

    def switch(self, name: str, default: bool) -> bool:
        """Returns True or False; `default` if it is missing or null."""
        if not isinstance(value := self.take(name, default), bool):
            self.refuse(name, value, "has to be true or false")
        return value

    def inner(self, name: str, default: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the reader of a nested dictionary; `default` if it is missing or null."""
        if not isinstance(value := self.take(name, default), Mapping):
            self.refuse(name, value, "has to have keys of its own")
        return dict(value)

    def names(self, name: str) -> list[str]:
        """Returns a list of names; empty if it is missing or null."""
        value = self.take(name, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            self.refuse(name, value, "has to be a list of names")
        return value

    def only(self, name: str, supported: Any) -> None:
        """Rejects any other value."""
        if (value := self.take(name, supported)) != supported:
            self.refuse(name, value, f"only {supported!r} is supported")

    def refuse(self, name: str, value: Any, why: str) -> NoReturn:
        raise InputError(f"{self.source}: {name} = {value!r}: {why}")

    def finish(self) -> list[str]:
        """Returns the keys that are ignored, except those known to change nothing.

        Raises:
            InputError: for a key that changes what the model computes.
        """
        left = {name: value for name, value in self._left.items() if value not in (None, False, {}, [])}
        for name in sorted(left.keys() & _REFUSED):
            self.refuse(name, left[name], "it changes what the model computes, and is not supported")
        return sorted(left.keys() - _INERT)


def _gpt2(keys: ConfigKeys) -> dict[str, Any]:
    size, heads = keys.count("n_embd"), keys.count("n_head")
    activation = keys.take("activation_function", "gelu_new")
    if activation not in list(_ACTIVATIONS):  # may be anything, also unhashable
        keys.refuse("activation_function", activation, f"supported are {', '.join(_ACTIVATIONS)}")
    keys.only("scale_attn_weights", True)
    keys.only("scale_attn_by_inverse_layer_idx", False)
    keys.only("add_cross_attention", False)
    return {
        "vocabulary_size": keys.count("vocab_size"),
        "layers": keys.count("n_layer"),
        "embedding_size": size,
        "heads": heads,
        "kv_heads": None,
        "head_size": _divided(keys, "n_embd", size, "n_head", heads),
        "feed_forward_size": keys.count("n_inner", 4 * size),
        "norm": "layer",
        "norm_epsilon": keys.number("layer_norm_epsilon", 1e-5),
        "attention_bias": "all",
        "feed_forward": _ACTIVATIONS[activation],
        "feed_forward_bias": True,
        "query_key_norm": False,
        "positions": "learned",
        "max_positions": keys.count("n_positions"),
        "tie_embeddings": keys.switch("tie_word_embeddings", True),
        "embedding_scale": 1.0,
    }


def _llama_like(keys: ConfigKeys, attention_bias: str, head_norm: bool = False) -> dict[str, Any]:
    size, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    kv_heads, head_size = keys.count("num_key_value_heads", heads), keys.count("head_dim", 0)
    activation = keys.take("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        keys.refuse("hidden_act", activation, "only 'silu' (SwiGLU) is supported")
    longest = keys.count("max_position_embeddings", 2048)
    return {
        "vocabulary_size": keys.count("vocab_size"),
        "layers": keys.count("num_hidden_layers"),
        "embedding_size": size,
        "heads": heads,
        "kv_heads": None if kv_heads == heads else kv_heads,
        "head_size": head_size or _divided(keys, "hidden_size", size, "num_attention_heads", heads),
        "feed_forward_size": keys.count("intermediate_size"),
        "norm": "rms",
        "norm_epsilon": keys.number("rms_norm_eps", 1e-6),
        "attention_bias": attention_bias,
        "feed_forward": "swiglu",
        "feed_forward_bias": keys.switch("mlp_bias", False),
        "query_key_norm": head_norm,
        "positions": "rope",
        "max_positions": int(min(longest, _window(keys))),
        "tie_embeddings": keys.switch("tie_word_embeddings", False),
        "embedding_scale": 1.0,
        **_rope(keys),
    }


def _llama(keys: ConfigKeys) -> dict[str, Any]:
    return _llama_like(keys, "all" if keys.switch("attention_bias", False) else "none")


def _mistral(keys: ConfigKeys) -> dict[str, Any]:
    return _llama_like(keys, "none")


def _qwen2(keys: ConfigKeys) -> dict[str, Any]:
    return _llama_like(keys, "qkv")


def _qwen3(keys: ConfigKeys) -> dict[str, Any]:
    return _llama_like(keys, "all" if keys.switch("attention_bias", False) else "none", head_norm=True)


def _divided(keys: ConfigKeys, name: str, size: int, by: str, heads: int) -> int:
    if size % heads:
        keys.refuse(name, size, f"does not divide into {by} = {heads}")
    return size // heads


def _window(keys: ConfigKeys) -> float:
    """Returns the largest distance at which a sliding window of some layers has no effect."""
    uses, window = keys.switch("use_sliding_window", True), keys.count("sliding_window", 0)
    kinds = keys.names("layer_types")
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        keys.refuse("layer_types", sorted(unknown), "only full and sliding attention are supported")
    slides = "sliding_attention" in kinds if kinds else uses
    return float(window) if window and slides else math.inf


def _rope(keys: ConfigKeys) -> dict[str, Any]:
    theta = keys.number("rope_theta", 10_000.0)
    scaling = keys.inner("rope_scaling", {})
    given = keys.inner("rope_parameters", scaling)
    keys.only("partial_rotary_factor", 1.0)
    rope = ConfigKeys(given, f"{keys.source}, rope_parameters or rope_scaling")
    older = rope.take("type", "default")
    kind, theta = rope.take("rope_type", older), rope.number("rope_theta", theta)
    rope.only("partial_rotary_factor", 1.0)
    settings = {"rope_theta": theta, "rope_scaling": "none"}
    if kind in ("linear", "llama3"):
        settings |= {"rope_scaling": kind, "rope_factor": rope.number("factor")}
    elif kind != "default":
        rope.refuse("rope_type", kind, "supported are default, linear and llama3")
    if kind == "llama3":
        settings |= {
            "rope_low_frequency": rope.number("low_freq_factor"),
            "rope_high_frequency": rope.number("high_freq_factor"),
            "rope_original_length": rope.count("original_max_position_embeddings"),
        }
    if ignored := rope.finish():
        rope.refuse(ignored[0], given[ignored[0]], f"not a setting of rope_type = {kind!r}")
    return settings


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture: its name in config.json, its classes, its tensors, and the functions that read its config."""

    model_type: str
    classes: tuple[str, str]
    prefix: str
    rows: tuple[TensorRow, ...]
    read: Callable[[ConfigKeys], dict[str, Any]]


ARCHITECTURES = {
    each.model_type: each
    for each in (
        Architecture("llama", ("LlamaForCausalLM", "LlamaModel"), "model.", LLAMA, _llama),
        Architecture("mistral", ("MistralForCausalLM", "MistralModel"), "model.", LLAMA, _mistral),
        Architecture("qwen2", ("Qwen2ForCausalLM", "Qwen2Model"), "model.", LLAMA, _qwen2),
        Architecture("qwen3", ("Qwen3ForCausalLM", "Qwen3Model"), "model.", LLAMA, _qwen3),
        Architecture("gpt2", ("GPT2LMHeadModel", "GPT2Model"), "transformer.", GPT2, _gpt2),
    )
}


class ReadConfig(NamedTuple):
    """The content of a config.json.

    Attributes:
        settings: the model settings that it decides.
        ignored: keys that are not known here, and that transformers ignores for this architecture.
    """

    architecture: Architecture
    settings: dict[str, Any]
    ignored: list[str]


def read_config(config: Mapping[str, Any], source: str) -> ReadConfig:
    """Reads a config.json.

    Raises:
        InputError: names what is not supported.
    """
    keys = ConfigKeys(config, source)
    name = keys.take("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        keys.refuse("model_type", name, f"supported are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    if others := set(keys.names("architectures")) - set(architecture.classes):
        keys.refuse("architectures", sorted(others), f"only {architecture.classes[0]} is supported")
    settings = architecture.read(keys)
    return ReadConfig(architecture, settings, keys.finish())


def write_config(architecture: Architecture, model: ModelSettings) -> dict[str, Any]:
    """Returns a config.json with the settings that the architecture can express; check it with `read_config`."""
    common = {
        "architectures": [architecture.classes[0]],
        "model_type": architecture.model_type,
        "vocab_size": model.vocabulary_size,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if architecture.model_type == "gpt2":
        named = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
        return common | {
            "n_embd": model.embedding_size,
            "n_head": model.heads,
            "n_layer": model.layers,
            "n_inner": model.feed_forward_size,
            "n_positions": model.max_positions or 1,  # a model without learned positions matches no architecture anyway
            "layer_norm_epsilon": model.norm_epsilon,
            "activation_function": named.get(model.feed_forward, "gelu_new"),
        }
    rope: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_type": "default"}
    if model.rope_scaling != "none":
        rope |= {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": model.rope_low_frequency,
            "high_freq_factor": model.rope_high_frequency,
            "original_max_position_embeddings": model.rope_original_length,
        }
    config = common | {
        "hidden_size": model.embedding_size,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_head_count,
        "head_dim": model.head_size,
        "num_hidden_layers": model.layers,
        "intermediate_size": model.feed_forward_size,
        "max_position_embeddings": model.max_positions or 1 << 20,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": "silu",
        # Written twice, for transformers before and from version 5.
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling == "none" else {n: v for n, v in rope.items() if n != "rope_theta"},
    }
    if architecture.model_type in ("llama", "qwen3"):
        config["attention_bias"] = model.attention_bias == "all"
    if architecture.model_type == "llama":
        config["mlp_bias"] = model.feed_forward_bias
    if architecture.model_type == "mistral":
        config["sliding_window"] = None
    return config
