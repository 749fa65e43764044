"""Tiny random classifiers, one for each architecture that transformers can put a sequence classification head on; and tiny random
language models.

Each row is a configuration class with sizes small enough to build and train in a test. All share the vocabulary and the special
tokens below. A variant of an architecture has a suffix after its model type: "gpt_neo/short".
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

VOCAB = 80  # token ids are 0 to 79
PAD, UNK, CLS, SEP = 0, 1, 2, 3
POSITIONS = 300  # so that texts of 200 tokens fit


@dataclass(frozen=True)
class Architecture:
    """One architecture, and where its head reads the text."""

    name: str  # the model type, with a suffix if it is a variant
    config: Callable[[], PreTrainedConfig]  # a fresh one at each call, for three labels
    decoder: bool  # the head reads the last token (True), or the first one or a pooled vector (False)

    @property
    def kind(self) -> str:
        """The model type."""
        return self.name.split("/")[0]


# What configuration classes call their attributes, and the value that each of them gets. Widths differ, so that a factor on the
# wrong side of a layer does not fit.
_USUAL: dict[str, Any] = {}
for _names, _value in (
    ("vocab_size", VOCAB),
    ("pad_token_id", PAD),
    ("mask_token_id", UNK),
    ("bos_token_id cls_token_id decoder_start_token_id", CLS),
    ("eos_token_id sep_token_id", SEP),
    ("max_position_embeddings n_positions max_seq_len", POSITIONS),
    ("type_vocab_size", 2),
    ("hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim prediction_head_size", 16),
    ("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth", 2),
    ("num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads", 2),
    ("num_self_attention_heads num_cross_attention_heads", 2),
    ("num_key_value_heads num_kv_heads", 1),
    ("head_dim d_head d_kv attention_head_size kv_channels", 8),
    ("intermediate_size n_inner hidden_dim dff ffn_dim d_inner d_ff ffn_hidden_size feed_forward_size", 40),
    ("encoder_ffn_dim decoder_ffn_dim", 40),
    ("sliding_window local_attention attention_window window_size keep_window_size", 8),
    ("local_attn_chunk_length lsh_attn_chunk_length", 8),
    # Mixtures of experts; queries and keys compressed to a low rank; linear attention; state space models.
    ("moe_intermediate_size shared_expert_intermediate_size", 24),
    ("num_experts num_local_experts n_routed_experts", 4),
    ("num_experts_per_tok moe_topk", 2),
    ("n_group topk_group n_shared_experts", 1),
    ("kv_lora_rank q_lora_rank", 12),
    ("qk_rope_head_dim", 4),
    ("qk_nope_head_dim", 6),
    ("v_head_dim linear_key_head_dim linear_value_head_dim", 8),
    ("linear_num_key_heads", 1),
    ("linear_num_value_heads n_mamba_heads", 2),
    ("mamba_d_state mamba_dt_rank", 4),
    ("use_mamba_kernels", False),  # of no effect in newer versions
    # Images and layouts.
    ("max_2d_position_embeddings image_size input_size", 16),
    ("patch_size", 8),
    # Trainers compare outputs, so nothing may be drawn at random; and weights are large, so that texts' outputs differ clearly.
    ("hidden_dropout_prob attention_probs_dropout_prob hidden_dropout attention_dropout activation_dropout dropout", 0.0),
    ("dropout_rate classifier_dropout classifier_dropout_prob classifier_dropout_rate seq_classif_dropout pooler_dropout", 0.0),
    ("resid_pdrop embd_pdrop attn_pdrop emb_pdrop resid_dropout embed_dropout residual_dropout embedding_dropout mlp_dropout", 0.0),
    ("summary_first_dropout summary_last_dropout lsh_attention_probs_dropout_prob local_attention_probs_dropout_prob", 0.0),
    ("router_jitter_noise", 0.0),
    ("initializer_range init_std initializer_std embed_init_std", 0.25),
):
    _USUAL |= dict.fromkeys(_names.split(), _value)


def _tiny(kind: str, **extra: Any) -> PreTrainedConfig:
    """A configuration with the usual values of the attributes it has, and `extra`, in which a dictionary with a model type is a
    configuration too."""
    known = inspect.signature(CONFIG_MAPPING[kind].__init__).parameters
    kwargs = {name: value for name, value in _USUAL.items() if name in known}
    if "qk_rope_head_dim" in known:  # each head has its own keys, and its width is a sum
        kwargs |= {"num_key_value_heads": 2}
        kwargs.pop("head_dim", None)
    for name, value in extra.items():
        value = copy.deepcopy(value)  # configurations keep what they are given, and change it
        kwargs[name] = _tiny(value.pop("model_type"), **value) if isinstance(value, dict) and "model_type" in value else value
    return CONFIG_MAPPING[kind](**kwargs)


_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_SHARED = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}  # two layers share weights
_SIGLIP = {"model_type": "siglip_vision_model"}
_LOCAL = {"attention_types": [[["global", "local"], 1]]}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": POSITIONS // 2}
_SCALED = {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}}
_MROPE = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}}

# Model type -> what is not usual.
_ENCODERS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 12},
    "albert/groups": {"num_hidden_groups": 2, "inner_group_num": 2},
    "bert": {},
    "big_bird": {"block_size": 1, "num_random_blocks": 1},  # at less than 8 blocks it turns to full attention for good
    "big_bird/full": {"attention_type": "original_full"},
    "camembert": {},
    "canine": {"num_hash_buckets": POSITIONS, "local_transformer_stride": 8},
    "cohere_compass_text/mean": {**_MROPE, "pooling": "mean"},
    "convbert": {"embedding_size": 12, "conv_kernel_size": 3},
    "data2vec-text": {},
    "deberta": _RELATIVE,
    "deberta/absolute": {},
    "deberta-v2": _RELATIVE,
    "deberta-v2/absolute": {},
    "deberta-v2/shared": {**_RELATIVE, "share_att_key": True, "position_buckets": 8},
    "distilbert": {},
    "distilbert/sinusoidal": {"sinusoidal_pos_embds": True},
    "electra": {"embedding_size": 12},
    "ernie": {"use_task_id": True},
    "esm": {},
    "esm/rotary": {"position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": 2},
    "eurobert": {},
    "eurobert/mean": {"classifier_pooling": "mean"},
    "eurobert/bos": {"classifier_pooling": "bos"},
    "flaubert": {},
    "fnet": {},
    "funnel": {"block_sizes": [1, 1]},
    "gte": {},
    "ibert": {},
    "jina_embeddings_v3": {},
    "layoutlm": {},
    "layoutlmv3": {"coordinate_size": 3, "shape_size": 2},
    "lilt": {"hidden_size": 24, "channel_shrink_ratio": 2},
    "longformer": {},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "markuplm": {
        "max_xpath_tag_unit_embeddings": 20,
        "max_xpath_subs_unit_embeddings": 20,
        "tag_pad_id": 16,
        "subs_pad_id": 17,
        "xpath_unit_hidden_size": 4,
        "max_depth": 4,
    },
    "megatron-bert": {},
    "mobilebert": {"embedding_size": 12, "intra_bottleneck_size": 8, "num_feedforward_networks": 2},
    "mobilebert/wide": {"embedding_size": 12, "use_bottleneck": False},
    "modernbert": _MIXED,
    "modernbert/mean": {**_MIXED, "classifier_pooling": "mean"},
    "modernvbert": {"text_config": {"model_type": "modernbert", **_MIXED}, "vision_config": _SIGLIP},
    "mpnet": {},
    "nomic_bert": {},
    "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8, "conv_kernel_size": 5},
    "perceiver": {"num_latents": 6, "d_latents": 24, "num_self_attends_per_block": 2},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 20],
        "axial_pos_embds_dim": [4, 12],
        "hash_seed": 0,
        "num_buckets": 4,
    },
    "rembert": {"input_embedding_size": 12, "output_embedding_size": 20},
    "roberta": {},
    "roberta-prelayernorm": {},
    "roc_bert": {"pronunciation_embed_dim": 8, "pronunciation_vocab_size": VOCAB, "shape_embed_dim": 12, "shape_vocab_size": VOCAB},
    "roformer": {"embedding_size": 12},
    "roformer/value": {"rotary_value": True},
    "squeezebert": {"q_groups": 2, "k_groups": 2, "v_groups": 2, "intermediate_groups": 2, "output_groups": 2},
    "tapas": {"type_vocab_sizes": [3, 4, 4, 2, 4, 4, 4]},
    "ultrabert": _MIXED,
    "ultravbert": {"text_config": {"model_type": "ultrabert", **_MIXED}, "vision_config": _SIGLIP},
    "xlm": {},
    "xlm-roberta": {},
    "xlm-roberta-xl": {},
    "xmod": {"default_language": "en_XX"},
    "yoso": {},
}
_DECODERS: dict[str, dict[str, Any]] = {
    "arcee": {},
    "axk1": {},
    "axk2": {"index_topk": 256, "index_head_dim": 8, "index_n_heads": 2, "gated_norm_rank": 4},
    "biogpt": {},
    "bloom": {},
    "cohere_compass_text": _MROPE,
    "ctrl": {},
    "deepseek_v2": {},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "doge": {},
    "exaone4": _MIXED,
    "falcon": {},
    "falcon/new": {"new_decoder_architecture": True},
    "falcon/alibi": {"alibi": True, "multi_query": False, "num_kv_heads": 2, "parallel_attn": False, "bias": True},
    "gemma": {"head_dim": 12},
    "gemma2": {"head_dim": 12, **_MIXED},
    "gemma3": {"text_config": {"model_type": "gemma3_text", **_MIXED}, "vision_config": _SIGLIP, "mm_tokens_per_image": 4},
    "gemma3_text": {"head_dim": 12, **_MIXED},
    "glm": {},
    "glm4": {},
    "gpt-sw3": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_bigcode/heads": {"multi_query": False},
    "gpt_neo": _LOCAL,
    "gpt_neo/short": {**_LOCAL, "max_position_embeddings": 64},
    "gpt_neox": {},
    "gpt_neox/sequential": {"use_parallel_residual": False},
    "gpt_oss": {**_MIXED, "rope_parameters": _YARN},
    "gptj": {"rotary_dim": 4},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {},
    "llama": {},
    "llama/biased": {"attention_bias": True, "mlp_bias": True},
    "minicpm3": {},
    "minimax": {**_LINEAR, "block_size": 8},
    "ministral": _MIXED,
    "ministral3": _SCALED,
    "mistral": {},
    "mistral4": _SCALED,
    "mixtral": {},
    "modernbert-decoder": _MIXED,
    "mpt": {},
    "nemotron": {},
    "olmo": {},
    "olmo/clipped": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": _MIXED,
    "openai-gpt": {"n_embd": 32, "initializer_range": 1.0},  # its layers start with a spread of 0.02 whatever this is
    "opt": {},
    "opt/projected": {"word_embed_proj_dim": 12, "do_layer_norm_before": False},
    "persimmon": {},
    "phi": {},
    "phi/norm": {"qk_layernorm": True},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2/sliding": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {},
    "qwen3": {"head_dim": 12},
    "qwen3_5": {
        "text_config": {"model_type": "qwen3_5_text", **_LINEAR},
        "vision_config": {"model_type": "qwen3_5_vision", "out_hidden_size": 16, "num_position_embeddings": 16},
    },
    "qwen3_5_text": _LINEAR,
    "qwen3_moe": {},
    "qwen3_moe/mixed": {"mlp_only_layers": [0]},
    "qwen3_next": _LINEAR,
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "stablelm/parallel": {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True},
    "starcoder2": {},
    "xlnet": {},
    "zamba": _SHARED,
    "zamba2": {**_SHARED, "chunk_size": 8},
    "zamba2/adapters": {**_SHARED, "num_key_value_heads": 2, "use_shared_attention_adapter": True, "adapter_rank": 4},
}
_GEMMA = {"model_type": "t5_gemma_module", **_MIXED}
_BOTH: dict[str, dict[str, Any]] = {
    "bart": {},
    "bigbird_pegasus": {"block_size": 1, "num_random_blocks": 1},
    "mbart": {},
    "mt5": {},
    "mvp": {},
    "plbart": {},
    "t5": {"decoder_start_token_id": PAD},
    "t5gemma": {"encoder": _GEMMA, "decoder": _GEMMA},
    "t5gemma2": {
        "encoder": {
            "model_type": "t5gemma2_encoder",
            "text_config": {"model_type": "t5gemma2_text", **_MIXED},
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
        },
        "decoder": {"model_type": "t5gemma2_decoder", **_MIXED},
    },
    "umt5": {},
}


def _rows(table: dict[str, dict[str, Any]], decoder: bool) -> dict[str, Architecture]:
    """The rows of a table, without the architectures that came after the installed version of transformers."""
    rows = (Architecture(name, partial(_tiny, name.split("/")[0], num_labels=3, **extra), decoder) for name, extra in table.items())
    return {row.name: row for row in rows if row.kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES}


ARCHITECTURES: Mapping[str, Architecture] = dict(sorted((_rows(_ENCODERS, False) | _rows(_DECODERS, True)).items()))
ENCODER_DECODERS: Mapping[str, Architecture] = _rows(_BOTH, True)
# Model type -> why no row has it.
LEFT_OUT: Mapping[str, str] = {
    "layoutlmv2": "needs images, and detectron2, which is not installed",
    "mra": "without its CUDA kernel its attention returns zeros, so all texts with one first token get the same output",
}


def uncovered() -> set[str]:
    """Model types that transformers has a sequence classifier for, and that are neither in a row nor left out for a reason."""
    rows = (*ARCHITECTURES.values(), *ENCODER_DECODERS.values())
    return set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES) - {row.kind for row in rows} - set(LEFT_OUT)


# ---- language models -----------------------------------------------------------------------------------------------------------

# What _USUAL calls PAD, UNK, CLS and SEP is here padding, the end of a text, the beginning of a turn and its end.
SPECIAL = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "i n", "e r", "a n", "an d", "Ġ the", "Ġ a", "o r", "1 2")
CAUSAL_VOCAB = 280  # more than the tokenizer has, as is common
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Name -> what is not usual. Soft caps are low enough to change the logits of a tiny model.
_CAUSAL: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 12, **_MIXED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 12, **_MIXED},
    "gpt2": {},
    "llama": {},
    "llama/tied": {"tie_word_embeddings": True},
    "mistral": {},  # each token sees eight
    "olmo2": {},
    "phi": {},  # half of each head is turned by its position
    "qwen3": {"head_dim": 12},
    "smollm3": {"no_rope_layers": [1, 0]},
}
CAUSAL = tuple(_CAUSAL)
# As wide as layers must be to be quantised.
_WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_CAUSAL |= {"llama/wide": _WIDE, "gpt2/wide": {"n_embd": 64, "n_inner": 128}}


def causal(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A language model with random weights, in fp32 and evaluation mode, and its tokenizer."""
    config = _tiny(name.split("/")[0], vocab_size=CAUSAL_VOCAB, **_CAUSAL[name])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval(), chat_tokenizer()


def chat_tokenizer() -> Any:
    """Bytes, and some pairs of them, so that every text comes back as it was; ChatML's template."""
    letters = sorted(ByteLevel.alphabet())
    pairs = [pair.replace(" ", "") for pair in MERGES]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *letters, *pairs))}
    words = Tokenizer(BPE(vocabulary, [(a, b) for a, b in map(str.split, MERGES)]))
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), Bytes()
    words.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    pad, end, begin, stop = SPECIAL
    out = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, unk_token=end, bos_token=begin, eos_token=stop, model_max_length=POSITIONS
    )
    out.chat_template = CHATML
    return out
