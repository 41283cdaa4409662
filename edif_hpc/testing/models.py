"""Tiny models, made on the spot.

A test needs a causal language model with a tokenizer in the layout of the Hugging Face hub, but no
network. So each builder here makes one from a configuration and a fixed seed: the same call writes
the same weights on every machine with the same torch. The weights are random, the output is noise,
and that is enough: what the tests compare is our execution against a plain local one.

The tokenizer is a byte-level BPE trained on sources of the standard library, or on words of the
caller's, each of which is then one token: any text round-trips, and its single special token serves
as begin, end and padding, within the vocabulary, so that transformers finds nothing to warn about.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SEED = 20240229
VOCABULARY = 1024
POSITIONS = 512
END_TOKEN = "<|end|>"  # noqa: S105 - a word of the vocabulary
MASK_TOKEN = "<|mask|>"  # noqa: S105 - likewise
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def build_tiny_gpt2(path: Path) -> Path:
    """Write a 2-layer, 64-wide GPT-2 (about 0.2 M parameters) and its tokenizer to `path`."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _write(path, config)


def build_tiny_llama(path: Path) -> Path:
    """Write a 2-layer, 64-wide Llama (rotary positions, grouped heads, tied) to `path`."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _write(path, config)


def build_slim_gpt2(path: Path, *, words: Sequence[str]) -> Path:
    """Write a GPT-2 with the small one's 12 layers, 12 heads and 768 columns, but thin blocks (30 M)."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_inner=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _write(path, config, words)


def build_chat_llama(path: Path, *, words: Sequence[str]) -> Path:
    """Write a 12-layer, 64-wide Llama whose tokenizer knows how to lay out a chat."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _write(path, config, words, chat_template=CHAT)


def build_tiny_bert(path: Path, *, words: Sequence[str]) -> Path:
    """Write a 2-layer, 64-wide BERT encoder, without a head."""
    return _write(path, _bert(), words, kind="AutoModel")


def build_masked_bert(path: Path) -> Path:
    """Write a 2-layer, 64-wide BERT that fills masks; as many of its kind, it has no pooler."""
    return _write(path, _bert(), kind="AutoModelForMaskedLM", mask_token=MASK_TOKEN)


def build_tiny_t5(path: Path) -> Path:
    """Write a 2-layer, 64-wide T5: an encoder, and a decoder that writes."""
    from transformers import T5Config

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _write(path, config, kind="AutoModelForSeq2SeqLM")


def build_tiny_experts(path: Path, *, words: Sequence[str]) -> Path:
    """Write a 2-layer, 64-wide Mixtral: a mixture of 4 experts."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _write(path, config, words)


def gpt2_small_shape(path: Path) -> Path:
    """Write a model of GPT-2 small's shape (124 M parameters, 500 MB) to `path`, for benches."""
    from transformers import GPT2Config

    config = GPT2Config(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return _write(path, config)


def _bert() -> PretrainedConfig:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
    )


def _write(
    path: Path,
    config: PretrainedConfig,
    words: Sequence[str] = (),
    *,
    kind: str = "AutoModelForCausalLM",
    chat_template: str = "",
    mask_token: str | None = None,
) -> Path:
    import torch
    import transformers

    path.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: PreTrainedModel = getattr(transformers, kind).from_config(config)
    model.save_pretrained(path)
    tokenizer = _tokenizer(words, mask_token)
    tokenizer.chat_template = chat_template or None
    tokenizer.save_pretrained(path)
    return path


def _tokenizer(words: Sequence[str], mask_token: str | None) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_TOKEN, *([mask_token] if mask_token else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = words or [inspect.getsource(module) for module in (json, textwrap)]
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=POSITIONS,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        mask_token=mask_token,
    )
