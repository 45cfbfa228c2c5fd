"""Tables of the tensors in a Hugging Face checkpoint and the parameters in them, one for each architecture.

    LINEAR      torch's dense layers, [out, in]; here [in, out] with separate heads (`[E, H, D]`, or `[H, D, E]`)
    CONV1D      GPT-2's dense layers, [in, out]; queries, keys and values joined in one
    VECTOR      biases and scales, [out]; with separate heads
    TABLE       unchanged

`{layer}` counts from 0. Rows whose parameters a model lacks (biases, the second table) are skipped.
"""

from typing import Literal, NamedTuple

Layout = Literal["linear", "conv1d", "vector", "table"]
LINEAR, CONV1D, VECTOR, TABLE = "linear", "conv1d", "vector", "table"


class TensorRow(NamedTuple):
    """A tensor, the parameters that it holds, and the conversion."""

    tensor: str
    parameters: tuple[str, ...]
    layout: Layout


def _tensor_row(tensor: str, layout: Layout, *parameters: str) -> TensorRow:
    return TensorRow(tensor, parameters, layout)


_G, _L = "transformer.h.{layer}.", "model.layers.{layer}."
_A, _F = "layers/{layer}/attention/", "layers/{layer}/feed_forward/"

GPT2 = (
    _tensor_row("transformer.wte.weight", TABLE, "embedding/table_VE"),
    _tensor_row("lm_head.weight", TABLE, "embedding/predicted_VE"),
    _tensor_row("transformer.wpe.weight", TABLE, "places/table_TE"),
    _tensor_row(_G + "ln_1.weight", VECTOR, "layers/{layer}/attention_norm/scale_E"),
    _tensor_row(_G + "ln_1.bias", VECTOR, "layers/{layer}/attention_norm/bias_E"),
    _tensor_row(_G + "attn.c_attn.weight", CONV1D, _A + "query_EHD", _A + "key_EHD", _A + "value_EHD"),
    _tensor_row(_G + "attn.c_attn.bias", VECTOR, _A + "query_bias_HD", _A + "key_bias_HD", _A + "value_bias_HD"),
    _tensor_row(_G + "attn.c_proj.weight", CONV1D, _A + "out_HDE"),
    _tensor_row(_G + "attn.c_proj.bias", VECTOR, _A + "out_bias_E"),
    _tensor_row(_G + "ln_2.weight", VECTOR, "layers/{layer}/feed_forward_norm/scale_E"),
    _tensor_row(_G + "ln_2.bias", VECTOR, "layers/{layer}/feed_forward_norm/bias_E"),
    _tensor_row(_G + "mlp.c_fc.weight", CONV1D, _F + "in_EF"),
    _tensor_row(_G + "mlp.c_fc.bias", VECTOR, _F + "in_bias_F"),
    _tensor_row(_G + "mlp.c_proj.weight", CONV1D, _F + "out_FE"),
    _tensor_row(_G + "mlp.c_proj.bias", VECTOR, _F + "out_bias_E"),
    _tensor_row("transformer.ln_f.weight", VECTOR, "final_norm/scale_E"),
    _tensor_row("transformer.ln_f.bias", VECTOR, "final_norm/bias_E"),
)

LLAMA = (
    _tensor_row("model.embed_tokens.weight", TABLE, "embedding/table_VE"),
    _tensor_row("lm_head.weight", TABLE, "embedding/predicted_VE"),
    _tensor_row(_L + "input_layernorm.weight", VECTOR, "layers/{layer}/attention_norm/scale_E"),
    _tensor_row(_L + "self_attn.q_proj.weight", LINEAR, _A + "query_EHD"),
    _tensor_row(_L + "self_attn.q_proj.bias", VECTOR, _A + "query_bias_HD"),
    _tensor_row(_L + "self_attn.k_proj.weight", LINEAR, _A + "key_EHD"),
    _tensor_row(_L + "self_attn.k_proj.bias", VECTOR, _A + "key_bias_HD"),
    _tensor_row(_L + "self_attn.v_proj.weight", LINEAR, _A + "value_EHD"),
    _tensor_row(_L + "self_attn.v_proj.bias", VECTOR, _A + "value_bias_HD"),
    _tensor_row(_L + "self_attn.o_proj.weight", LINEAR, _A + "out_HDE"),
    _tensor_row(_L + "self_attn.o_proj.bias", VECTOR, _A + "out_bias_E"),
    _tensor_row(_L + "self_attn.q_norm.weight", VECTOR, _A + "query_norm/scale_E"),
    _tensor_row(_L + "self_attn.k_norm.weight", VECTOR, _A + "key_norm/scale_E"),
    _tensor_row(_L + "post_attention_layernorm.weight", VECTOR, "layers/{layer}/feed_forward_norm/scale_E"),
    _tensor_row(_L + "mlp.gate_proj.weight", LINEAR, _F + "gate_EF"),
    _tensor_row(_L + "mlp.gate_proj.bias", VECTOR, _F + "gate_bias_F"),
    _tensor_row(_L + "mlp.up_proj.weight", LINEAR, _F + "in_EF"),
    _tensor_row(_L + "mlp.up_proj.bias", VECTOR, _F + "in_bias_F"),
    _tensor_row(_L + "mlp.down_proj.weight", LINEAR, _F + "out_FE"),
    _tensor_row(_L + "mlp.down_proj.bias", VECTOR, _F + "out_bias_E"),
    _tensor_row("model.norm.weight", VECTOR, "final_norm/scale_E"),
)
"""Table of Llama, also for Mistral, Qwen2 and Qwen3."""

BUFFERS = r"(.*\.)?(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)"
"""Constants that older versions saved with the weights: masks and angles, which follow from the config."""
