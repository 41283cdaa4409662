"""An unmodified nnsight client in a fresh process, with only the hub's address."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CLIENT = """
import json, sys
from nnsight import LanguageModel
name = sys.argv[1]
meta = LanguageModel(name)
model = LanguageModel(name, dispatch=True)
with model.trace("The Eiffel Tower"):
    logits = model.lm_head.output.detach().save()
key = meta.to_model_key()
size = type(meta).describe_checkpoint(key, "float32").n_params
print(json.dumps({
    "key": key,
    "device": next(meta.parameters()).device.type,
    "finite": bool(logits.isfinite().all()),
    "vocabulary": logits.shape[-1],
    "parameters": size,
}))
"""


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("edif/tiny-gpt2", "edif/tiny-gpt2"),
        ("tiny-gpt2", "edif/tiny-gpt2"),
        ("edif/tiny-llama", "edif/tiny-llama"),
    ],
)
def test_client_builds_names_loads_and_traces(
    tmp_path: Path, loopback_hub: str, name: str, canonical: str
) -> None:
    script = tmp_path / "client.py"  # nnsight reads the block's source from a file
    script.write_text(CLIENT)
    environment = {
        "PATH": os.environ["PATH"],
        "HF_ENDPOINT": loopback_hub,
        "HF_HOME": str(tmp_path / "hf"),
        "HOME": str(tmp_path),
    }
    run = subprocess.run(
        [sys.executable, script, name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    arguments = json.loads(seen["key"].partition(":")[2])
    assert arguments == {"repo_id": canonical, "revision": None, "task": "text-generation"}
    assert seen["device"] == "meta"
    assert seen["finite"]
    assert seen["vocabulary"] == 1024
    assert seen["parameters"] > 100_000


def test_as_a_process_it_prints_its_url_and_ends_on_sigterm(tiny_gpt2: Path) -> None:
    command = [sys.executable, "-m", "edif_hpc.testing.hub", "--model", f"edif/tiny={tiny_gpt2}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as hub:
        try:
            assert hub.stdout is not None
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+\n", hub.stdout.readline())
            hub.terminate()
            assert hub.wait(timeout=30) == -signal.SIGTERM
        finally:
            hub.kill()
