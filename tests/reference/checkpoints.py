"""Random checkpoints of transformers (PyTorch), and the logits that it computes: what imports are compared with.

    python checkpoints.py OUT --seed=0 --each=20        (in the environment of setup.sh beside this file)

OUT/gpt2-00, ...   a folder as save_pretrained writes it, with a tokenizer, and expected.npz: tokens, logits in float32
OUT/llama-00, ...  the same of Llama, Mistral, Qwen2 and Qwen3 in turn

Sizes are tiny. Everything that the configs allow is drawn: layers, heads, key heads, sizes, biases, tied tables, base
and scaling of the angles, epsilons; also how it is stored: in one file or several, in float32 or bfloat16, with the
names of the config before version 5 of transformers. All weights are random, biases and scales of norms too.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROWS, TOKENS = 2, 24


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<|begin|>"], initial_alphabet=alphabet)
    made.train_from_iterator(["the cat and the dog and the other cat"] * 9, trainer)
    return made


def gpt2(draw: random.Random, vocabulary: int) -> transformers.PreTrainedModel:
    heads, size = draw.choice([1, 2, 4]), draw.choice([4, 6, 8])
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_layer=draw.randint(1, 3), n_head=heads, n_embd=heads * size,
        n_positions=draw.choice([TOKENS, 40]), n_inner=draw.choice([None, 10, 24]),
        activation_function=draw.choice(["gelu_new", "gelu", "relu", "gelu_pytorch_tanh"]),
        layer_norm_epsilon=draw.choice([1e-5, 1e-3]), tie_word_embeddings=draw.random() < 0.7,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def rope(draw: random.Random) -> dict:
    kind = draw.choice(["default", "llama3", "linear"])
    settings = {"rope_type": kind, "rope_theta": draw.choice([100.0, 10_000.0, 500_000.0])}
    if kind != "default":
        settings["factor"] = draw.choice([2.0, 8.0])
    if kind == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    return settings


def llama(draw: random.Random, vocabulary: int, family: str) -> transformers.PreTrainedModel:
    heads, size = draw.choice([1, 2, 4]), draw.choice([4, 8])
    settings = dict(
        vocab_size=vocabulary, num_hidden_layers=draw.randint(1, 3), num_attention_heads=heads,
        num_key_value_heads=draw.choice([part for part in (1, 2, 4) if heads % part == 0]),
        hidden_size=heads * size, intermediate_size=draw.choice([10, 24]), rms_norm_eps=draw.choice([1e-6, 1e-3]),
        tie_word_embeddings=draw.random() < 0.5, max_position_embeddings=draw.choice([64, 4096]),
        rope_parameters=rope(draw), bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    if family in ("Llama", "Mistral", "Qwen3"):
        settings["head_dim"] = draw.choice([size, 6, 10])
    if family in ("Llama", "Qwen3"):
        settings["attention_bias"] = draw.random() < 0.5
    if family == "Llama":
        settings["mlp_bias"] = draw.random() < 0.5
    if family == "Mistral":
        settings["sliding_window"] = draw.choice([None, TOKENS])
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def randomized(model: transformers.PreTrainedModel, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Rounds the weights to `dtype`, so that stored weights are those that were used."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 1.0 if "norm" in name or "ln_" in name else 0.0
            weight.copy_((scale * ("bias" not in name) + 0.3 * torch.randn(weight.shape)).to(dtype))
    return model.eval()


def renamed(config: dict) -> dict:
    """Writes the config as versions before 5 did."""
    scaling = dict(config.pop("rope_parameters"))
    theta, kind = scaling.pop("rope_theta"), scaling["rope_type"]
    dtype = config.pop("dtype")
    scaling = (
        None if kind == "default" else scaling if kind == "llama3" else {"type": kind, "factor": scaling["factor"]}
    )
    return {**config, "rope_theta": theta, "rope_scaling": scaling, "torch_dtype": dtype}


def write(folder: Path, model: transformers.PreTrainedModel, draw: random.Random, spoken: Tokenizer) -> None:
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16])
    model = randomized(model, dtype)
    tokens = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS))
    tokens[:, 0] = model.config.bos_token_id
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    size = draw.choice(["5GB", "5KB"])
    model.to(dtype).save_pretrained(folder, max_shard_size=size)
    config = json.loads((folder / "config.json").read_text())
    if "rope_parameters" in config and draw.random() < 0.5:
        (folder / "config.json").write_text(json.dumps(renamed(config), indent=2))
    spoken.save(str(folder / "tokenizer.json"))
    np.savez(folder / "expected.npz", tokens=tokens.numpy(), logits=logits.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=20)
    options = parser.parse_args()
    draw, spoken = random.Random(options.seed), tokenizer()
    torch.manual_seed(options.seed)
    transformers.utils.logging.disable_progress_bar()
    for number in range(options.each):
        write(options.out / f"gpt2-{number:02}", gpt2(draw, 280), draw, spoken)
        family = ("Llama", "Mistral", "Qwen2", "Qwen3")[number % 4]
        write(options.out / f"llama-{number:02}", llama(draw, 280, family), draw, spoken)


if __name__ == "__main__":
    main()
