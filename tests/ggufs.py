"""GGUF files of tiny Llamas, written as llama.cpp's converter writes them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONTROL, NORMAL, UNUSED = 3, 1, 5  # types of tokens


def write_llama(
    model: Any,
    tokenizer: Any,
    path: Path,
    architecture: str = "llama",
    pre: str = "gpt-2",
    bos: bool = False,
    left_out: Callable[[str], bool] = lambda name: False,
    more: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a Llama in fp32.

    Args:
        pre: how the tokenizer says that it splits text.
        bos: whether texts begin with the first token.
        left_out: the tensors, by GGUF's names, that are not written.
        more: tensors that are written, too.
    """
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config.vocab_size, pre, bos)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.named_parameters():
        found = _named(name)
        x = weight.detach().float().numpy()
        if found.split(".")[-2] in heads:
            x = interleaved(x, heads[found.split(".")[-2]])
        if not left_out(found):
            writer.add_tensor(found, x)
    for name, x in (more or {}).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _named(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    layer, module = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys, (heads * 2 * half, d): llama.cpp turns neighbours, transformers row i and row i + half."""
    half = weight.shape[0] // heads // 2
    order = [h * 2 * half + side * half + i for h in range(heads) for i in range(half) for side in (0, 1)]
    return np.ascontiguousarray(weight[order])


def _add_tokenizer(writer: GGUFWriter, tokenizer: Any, rows: int, pre: str, bos: bool) -> None:
    import json

    words = tokenizer.get_vocab()
    spare = [f"[PAD{id}]" for id in range(len(words), rows)]
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*sorted(words, key=words.__getitem__), *spare])
    writer.add_token_types([CONTROL if id in special else NORMAL for id in range(len(words))] + [UNUSED] * len(spare))
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(bos)
    writer.add_chat_template(tokenizer.chat_template)
