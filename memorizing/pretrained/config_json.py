"""config.json of a Hugging Face folder to settings of the model, and back.

Every key is one that is known: it becomes a setting, must have the one value that is supported, or changes nothing
(names, training, generation). Any other one that is switched on is refused, for it may change what the model computes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from memorizing.errors import InputError
from memorizing.model.settings import ModelSettings
from memorizing.pretrained.tables import GPT2, LLAMA, Row

_CHANGE_NOTHING = """
architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash
initializer_range use_cache attention_dropout attn_pdrop embd_pdrop resid_pdrop gradient_checkpointing
bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
id2label label2id num_labels problem_type task_specific_params n_ctx pretraining_tp reorder_and_upcast_attn
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
output_attentions output_hidden_states return_dict torchscript is_decoder attn_implementation _attn_implementation
max_length min_length do_sample num_beams temperature top_k top_p typical_p repetition_penalty length_penalty
diversity_penalty num_beam_groups num_return_sequences chunk_size_feed_forward encoder_no_repeat_ngram_size
no_repeat_ngram_size max_window_layers
"""
_INERT = frozenset(_CHANGE_NOTHING.split())
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


class Keys:
    """The keys of a config.json, each of which has to be taken."""

    def __init__(self, config: Mapping[str, Any], source: str):
        self._left, self.source = dict(config), source

    def take(self, name: str, default: Any = ...) -> Any:
        """A value; `default` where it is missing or null."""
        value = self._left.pop(name, None)
        if value is not None:
            return value
        if default is ...:
            raise InputError(f"{self.source} has no {name}: it is not a whole config of this architecture")
        return default

    def only(self, name: str, supported: Any) -> None:
        """Refuses any other value."""
        if (value := self.take(name, supported)) != supported:
            self.refuse(name, value, f"only {supported!r} is supported")

    def refuse(self, name: str, value: Any, why: str) -> NoReturn:
        raise InputError(f"{self.source}: {name} = {value!r}: {why}")

    def finish(self) -> None:
        """Refuses what was not taken, unless it changes nothing."""
        for name, value in self._left.items():
            if name not in _INERT and value not in (None, False, {}, []):
                self.refuse(
                    name, value,
                    "this key is not known here, and may change what the model computes; if it does not, remove it "
                    "from a copy of the folder",
                )  # fmt: skip


def _gpt2(keys: Keys) -> dict[str, Any]:
    size, heads = keys.take("n_embd"), keys.take("n_head")
    activation = keys.take("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        keys.refuse("activation_function", activation, f"supported are {', '.join(_ACTIVATIONS)}")
    keys.only("scale_attn_weights", True)
    keys.only("scale_attn_by_inverse_layer_idx", False)
    keys.only("add_cross_attention", False)
    return {
        "vocabulary_size": keys.take("vocab_size"),
        "layers": keys.take("n_layer"),
        "embedding_size": size,
        "heads": heads,
        "key_heads": None,
        "head_size": _divided(keys, "n_embd", size, "n_head", heads),
        "feed_forward_size": keys.take("n_inner", 4 * size),
        "norm": "layer",
        "norm_epsilon": keys.take("layer_norm_epsilon", 1e-5),
        "attention_bias": "all",
        "feed_forward": _ACTIVATIONS[activation],
        "feed_forward_bias": True,
        "query_key_norm": False,
        "positions": "learned",
        "max_positions": keys.take("n_positions"),
        "tie_embeddings": keys.take("tie_word_embeddings", True),
        "embedding_scale": 1.0,
    }


def _llama_like(keys: Keys, attention_bias: str, head_norm: bool = False) -> dict[str, Any]:
    size, heads = keys.take("hidden_size"), keys.take("num_attention_heads")
    key_heads, head_size = keys.take("num_key_value_heads", heads), keys.take("head_dim", 0)
    activation = keys.take("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        keys.refuse("hidden_act", activation, "only 'silu' (SwiGLU) is supported")
    longest = keys.take("max_position_embeddings", 2048)
    return {
        "vocabulary_size": keys.take("vocab_size"),
        "layers": keys.take("num_hidden_layers"),
        "embedding_size": size,
        "heads": heads,
        "key_heads": None if key_heads == heads else key_heads,
        "head_size": head_size or _divided(keys, "hidden_size", size, "num_attention_heads", heads),
        "feed_forward_size": keys.take("intermediate_size"),
        "norm": "rms",
        "norm_epsilon": keys.take("rms_norm_eps", 1e-6),
        "attention_bias": attention_bias,
        "feed_forward": "swiglu",
        "feed_forward_bias": keys.take("mlp_bias", False),
        "query_key_norm": head_norm,
        "positions": "rope",
        "max_positions": int(min(longest, _window(keys))),
        "tie_embeddings": keys.take("tie_word_embeddings", False),
        "embedding_scale": 1.0,
        **_rope(keys),
    }


def _llama(keys: Keys) -> dict[str, Any]:
    return _llama_like(keys, "all" if keys.take("attention_bias", False) else "none")


def _mistral(keys: Keys) -> dict[str, Any]:
    return _llama_like(keys, "none")


def _qwen2(keys: Keys) -> dict[str, Any]:
    return _llama_like(keys, "qkv")


def _qwen3(keys: Keys) -> dict[str, Any]:
    return _llama_like(keys, "all" if keys.take("attention_bias", False) else "none", head_norm=True)


def _divided(keys: Keys, name: str, size: int, by: str, heads: int) -> int:
    if size % heads:
        keys.refuse(name, size, f"does not divide into {by} = {heads}")
    return size // heads


def _window(keys: Keys) -> float:
    """The most tokens that one sees where some layers have a sliding window: up to these it changes nothing."""
    uses, window = keys.take("use_sliding_window", None), keys.take("sliding_window", None)
    kinds = keys.take("layer_types", [])
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        keys.refuse("layer_types", sorted(unknown), "only full and sliding attention are supported")
    slides = "sliding_attention" in kinds if kinds else uses is not False
    return float(window) if window and slides else math.inf


def _rope(keys: Keys) -> dict[str, Any]:
    theta = keys.take("rope_theta", None)
    scaling = dict(keys.take("rope_scaling", {}))
    given = dict(keys.take("rope_parameters", scaling))
    keys.only("partial_rotary_factor", 1.0)
    rope = Keys(given, f"{keys.source}, rope_parameters or rope_scaling")
    older = rope.take("type", "default")
    kind, theta = rope.take("rope_type", older), rope.take("rope_theta", theta or 10_000.0)
    rope.only("partial_rotary_factor", 1.0)
    settings = {"rope_theta": float(theta), "rope_scaling": "none"}
    if kind in ("linear", "llama3"):
        settings |= {"rope_scaling": kind, "rope_factor": float(rope.take("factor"))}
    elif kind != "default":
        rope.refuse("rope_type", kind, "supported are default, linear and llama3")
    if kind == "llama3":
        settings |= {
            "rope_low_frequency": float(rope.take("low_freq_factor")),
            "rope_high_frequency": float(rope.take("high_freq_factor")),
            "rope_original_length": rope.take("original_max_position_embeddings"),
        }
    rope.finish()
    return settings


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family of models: its name in config.json, its classes, its tensors, and how its config is read."""

    model_type: str
    classes: tuple[str, str]
    prefix: str
    rows: tuple[Row, ...]
    read: Callable[[Keys], dict[str, Any]]


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


def read_config(config: Mapping[str, Any], source: str) -> tuple[Architecture, dict[str, Any]]:
    """The architecture, and those settings of the model that it decides.

    Raises:
        InputError: naming what is not supported.
    """
    keys = Keys(config, source)
    name = keys.take("model_type")
    if name not in ARCHITECTURES:
        keys.refuse("model_type", name, f"supported are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    if others := set(keys.take("architectures", [])) - set(architecture.classes):
        keys.refuse("architectures", sorted(others), f"only {architecture.classes[0]} is supported")
    settings = architecture.read(keys)
    keys.finish()
    for field in dataclasses.fields(ModelSettings):
        value = settings.get(field.name)
        if field.type is int and field.name in settings and (isinstance(value, bool) or not isinstance(value, int)):
            raise InputError(f"{source}: {value!r} is no whole number, which {field.name} has to be")
    return architecture, settings


def write_config(architecture: Architecture, model: ModelSettings) -> dict[str, Any]:
    """A config.json that says what of the settings the architecture can say; compare what `read_config` makes of it."""
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
            "n_positions": model.max_positions,
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
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "num_hidden_layers": model.layers,
        "intermediate_size": model.feed_forward_size,
        "max_position_embeddings": model.max_positions or 1 << 20,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": "silu",
        # Twice, for versions of transformers before and from 5.
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
