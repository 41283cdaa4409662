from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edif_hpc.testing.models import build_tiny_gpt2

TEXT = "def main(args):\n    print('Grüße, 世界 🎉')"


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_loads_and_generates_without_a_warning(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer([TEXT, "short"], padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 4
    assert len(tokenizer) == model.config.vocab_size


def test_any_text_round_trips(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


def test_building_twice_gives_the_same_files(tmp_path: Path, tiny_gpt2: Path) -> None:
    torch.rand(1)  # where the process's own generator stands makes no difference
    generator_state = torch.random.get_rng_state()
    again = build_tiny_gpt2(tmp_path / "again")
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in tiny_gpt2.iterdir()
    }
    assert torch.equal(torch.random.get_rng_state(), generator_state)
