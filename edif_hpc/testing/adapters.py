"""A tiny LoRA for a tiny model, made on the spot as the models are (`testing.models`): from a configuration and a seed.

All its weights are random, also those that a fresh LoRA starts at zero: attached or not attached must show in the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SEED = 20250131


def build_tiny_lora(
    path: Path, base: Path, *, targets: Sequence[str] = ("c_attn",), safetensors: bool = True
) -> Path:
    """Write a LoRA of rank 4 for the model in `base` to `path`; without `safetensors`, as a pickle."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    conv1d = "GPT2" in type(model).__name__
    config = LoraConfig(
        r=4,
        target_modules=list(targets),
        fan_in_fan_out=conv1d,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        adapted = get_peft_model(model, config)
    adapted.save_pretrained(path, safe_serialization=safetensors)
    return path
