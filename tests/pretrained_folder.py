"""A tiny Llama as a Hugging Face folder, written by hand: names and shapes as in those that are shared."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 500.0,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 290, "eos_token_id": 291,
    "torch_dtype": "float32", "transformers_version": "4.57.0", "use_cache": True,
}  # fmt: skip
TEXT = "the cat and the dog and the other cat sat there; " * 40


def shapes() -> dict[str, tuple[int, ...]]:
    """[out, in], as torch has them."""
    found = {"model.embed_tokens.weight": (300, 16), "model.norm.weight": (16,), "lm_head.weight": (300, 16)}
    for layer in range(2):
        for name, shape in {
            "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
            "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
            "input_layernorm": (16,), "post_attention_layernorm": (16,),
        }.items():  # fmt: skip
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return found


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) + ("norm" in name) for name, shape in shapes().items()}


def tokenizer() -> Tokenizer:
    """Byte-level BPE of 280 pieces, and special tokens with ids 290 and 291, as large models have them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([TEXT, "a much longer line of other words, so that there are merges enough"] * 9, trainer)
    described = json.loads(made.to_str())
    described["added_tokens"] = [
        {"id": id, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for id, name in ((290, "<|begin|>"), (291, "<|end|>"))
    ]  # fmt: skip
    return Tokenizer.from_str(json.dumps(described))


def write_folder(folder: Path, config: dict | None = None, own: dict[str, np.ndarray] | None = None) -> Path:
    """Everything that an import needs."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    save_file(tensors() if own is None else own, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder
