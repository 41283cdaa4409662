"""Unmodified nnsight, transformers and huggingface_hub, in fresh processes with only the hub's address."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edif_hpc.objects.repository import read_manifest

if TYPE_CHECKING:
    from conftest import Relay

NAME = "lab/tiny"
META = """
import json, sys
import nnsight
from nnsight import LanguageModel
from huggingface_hub import HfApi
name, relay = sys.argv[1:3]
meta = LanguageModel(name)
nnsight.CONFIG.API.HOST = relay
key = meta.to_model_key()
print(json.dumps({
    "key": key,
    "device": next(meta.parameters()).device.type,
    "text": meta.tokenizer.decode(meta.tokenizer("def f(x):")["input_ids"]),
    "parameters": type(meta).describe_checkpoint(key, "float32").n_params,
    "running": nnsight.is_model_running(name),
    "commit": HfApi().model_info(name).sha,
}))
"""
DISPATCH = """
import json, sys
import torch
from nnsight import LanguageModel
name, folder = sys.argv[1:3]
there, local = (LanguageModel(place, dispatch=True, task="text-generation") for place in (name, folder))
def run(model):
    with model.trace("The Eiffel Tower"):
        logits = model.lm_head.output.save()
    return logits
print(json.dumps({"same": torch.equal(run(there), run(local))}))
"""
REFUSED = """
import json, sys
from nnsight import LanguageModel
texts = []
for name in sys.argv[2:]:
    try:
        LanguageModel(name, dispatch=sys.argv[1] == "dispatch")
    except Exception as error:
        texts.append("".join(f"{type(e).__name__}: {e}" for e in (error, error.__cause__) if e))
print(json.dumps({"texts": texts}))
"""
SNAPSHOT = """
import json, sys
from pathlib import Path
from huggingface_hub import snapshot_download
folder = Path(snapshot_download(sys.argv[1]))
print(json.dumps({"commit": folder.name, "files": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())}))
"""


@pytest.mark.parametrize("how", ["deployed from a folder", "published"])
def test_a_client_without_the_hub_builds_names_and_asks(
    relay: Relay, tiny_gpt2: Path, run_client: Callable[..., Any], how: str
) -> None:
    if how == "published":
        relay.cli("hub", "publish", NAME, str(tiny_gpt2))
        relay.deploy(NAME, "/cluster/models/tiny")
    else:
        relay.deploy(NAME, tiny_gpt2)
    seen = run_client(META, relay.hub, "Lab/Tiny", relay.url)
    manifest = read_manifest(tiny_gpt2)
    assert json.loads(seen.pop("key").partition(":")[2]) == {
        "repo_id": NAME,
        "revision": None,
        "task": "text-generation",
    }
    assert seen == {
        "device": "meta",
        "text": "def f(x):",
        "parameters": sum(manifest.parameters.values()),
        "running": False,
        "commit": manifest.commit,
    }


@pytest.mark.parametrize("how", ["deployed from a folder", "published"])
def test_weights_where_the_operator_says(
    start_relay: Callable[..., Relay], tiny_gpt2: Path, run_client: Callable[..., Any], how: str
) -> None:
    relay = start_relay(hub_weights="other/*, lab/*")
    if how == "published":
        relay.cli("hub", "publish", NAME, str(tiny_gpt2), "--weights")
    else:
        relay.deploy(NAME, tiny_gpt2)
    assert run_client(DISPATCH, relay.hub, NAME, str(tiny_gpt2)) == {"same": True}


def test_without_weights_the_client_says_what_is_missing(
    relay: Relay, tiny_gpt2: Path, run_client: Callable[..., Any]
) -> None:
    relay.deploy(NAME, tiny_gpt2)
    [text] = run_client(REFUSED, relay.hub, "dispatch", NAME)["texts"]
    assert "does not appear to have a file named" in text
    assert "model.safetensors" in text


def test_an_unknown_name_lists_what_is_here(
    relay: Relay, tiny_gpt2: Path, run_client: Callable[..., Any]
) -> None:
    relay.deploy(NAME, tiny_gpt2)
    relay.deploy("lab/elsewhere", "/cluster/models/elsewhere")
    unknown, absent = run_client(REFUSED, relay.hub, "meta", "lab/other", "lab/elsewhere")["texts"]
    assert "Here is: lab/tiny" in unknown
    assert "edif-hpc hub publish" in absent


def test_a_snapshot_holds_what_is_served(
    relay: Relay, tiny_gpt2: Path, run_client: Callable[..., Any]
) -> None:
    relay.cli("hub", "publish", NAME, str(tiny_gpt2))
    seen = run_client(SNAPSHOT, relay.hub, NAME)
    manifest = read_manifest(tiny_gpt2)
    assert seen["commit"] == manifest.commit
    assert seen["files"] == sorted(set(manifest.files) - {"model.safetensors"})
