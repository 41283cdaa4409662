"""Model keys, names and the allow-lists: what a client may ask for, and what serves it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edif_hpc.domain.adapter import Adapter
from edif_hpc.domain.deployment import (
    Deployment,
    ModelKey,
    check_device,
    check_env,
    check_name,
    check_weights,
    default_name,
    each_task,
    find_deployment,
    parse_model_key,
)
from edif_hpc.errors import InvalidInput, NotFound, NotPermitted

CLASS = "nnsight.modeling.transformers.TransformersModel"
TINY = Deployment(name="tiny", repo_id="edif/Tiny", revision=None, task="text-generation")
KEY = ModelKey(import_path=CLASS, repo_id="edif/Tiny", revision=None, task="text-generation")


def key_text(**body: Any) -> str:
    return f"{CLASS}:{json.dumps(body)}"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (key_text(repo_id="edif/Tiny", revision=None, task="text-generation"), KEY),
        (key_text(repo_id="edif/Tiny", revision="main"), KEY),
        (key_text(repo_id="edif/Tiny"), KEY),
        (key_text(repo_id="edif/Tiny", revision="v2"), replace(KEY, revision="v2")),
        (key_text(repo_id="edif/Tiny", task="fill-mask"), replace(KEY, task="fill-mask")),
        (
            key_text(repo_id="edif/Tiny", trust_remote_code=True),
            replace(KEY, trust_remote_code=True),
        ),
    ],
)
def test_spellings_of_a_model_meet(text: str, key: ModelKey) -> None:
    assert parse_model_key(text) == key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('os.system:{"repo_id": "a/b"}', "is not served; use one of: nnsight"),
        ("", "is not served"),
        (CLASS, "not class:json"),
        (f"{CLASS}:[]", "not class:json"),
        (f"{CLASS}:{{", "not class:json"),
        (key_text(revision="v2"), "not class:json with a repo_id"),
        (key_text(repo_id=7), "wrong type"),
        (key_text(repo_id="a/b", task=["x"]), "wrong type"),
        (key_text(repo_id="a/b", trust_remote_code="yes"), "wrong type"),
        (key_text(repo_id="a/b", revision=3), "string or null, not 3"),
    ],
)
def test_a_key_that_cannot_be_served_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        parse_model_key(text)


@given(
    st.builds(
        ModelKey,
        import_path=st.just(CLASS),
        repo_id=st.text(),
        revision=st.none() | st.text().filter(lambda text: text != "main"),
        task=st.text(min_size=1),
        trust_remote_code=st.booleans(),
    )
)
def test_a_key_survives_the_wire(key: ModelKey) -> None:
    assert parse_model_key(key.render()) == key


def test_a_key_is_written_as_the_client_writes_it() -> None:
    assert KEY.render() == (
        f'{CLASS}:{{"repo_id": "edif/Tiny", "revision": null, "task": "text-generation"}}'
    )


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, None),
        ({"attn_implementation": "eager"}, None),
        ({"attn_implementation": "sdpa", "peft": None}, None),
        ({"attn_implementation": None}, None),
        ({"attn_implementation": "flash_attention_2"}, "use one of: eager, sdpa"),
        ({"peft": "lab/lora", "attn_implementation": "sdpa"}, None),
        (
            {"peft": "some/adapter"},
            "'some/adapter' is not served with this model; served: lab/lora, a/b. ",
        ),
        ({"peft": "LAB/lora"}, "PEFT adapter 'LAB/lora' is not served"),
        ({"peft": ["lab/lora"]}, r"PEFT adapter \['lab/lora'\] is not served"),
        ({"LD_PRELOAD": "x", "a": 1}, r"\['LD_PRELOAD', 'a'\]"),
    ],
)
def test_env_is_an_allow_list(env: dict[str, Any], words: str | None) -> None:
    adapters = (Adapter(repo_id="lab/lora", revision="c0ffee"), Adapter(repo_id="a/b"))
    if words is None:
        check_env(env, adapters)
    else:
        with pytest.raises(InvalidInput, match=words):
            check_env(env, adapters)


def test_without_adapters_none_is_served() -> None:
    with pytest.raises(InvalidInput, match=r"served: none\."):
        check_env({"peft": "lab/lora"})


@pytest.mark.parametrize(
    ("key", "trusting", "served"),
    [
        (KEY, False, True),
        (replace(KEY, repo_id="EDIF/tiny"), False, True),  # the Hub ignores case
        (replace(KEY, revision="v2"), False, False),
        (replace(KEY, task="fill-mask"), False, False),
        (replace(KEY, repo_id="edif/other"), False, False),
        (replace(KEY, trust_remote_code=True), False, False),
        (replace(KEY, trust_remote_code=True), True, True),
        (KEY, True, True),
    ],
)
def test_what_a_deployment_serves(key: ModelKey, *, trusting: bool, served: bool) -> None:
    assert replace(TINY, trust_remote_code=trusting).serves(key) is served


def test_own_code_of_a_model_needs_the_operators_word() -> None:
    key = replace(KEY, trust_remote_code=True)
    with pytest.raises(
        NotPermitted, match=r"deployed here without its own code.*--trust-remote-code"
    ):
        find_deployment(key, [TINY])
    trusting = replace(TINY, name="trusting", trust_remote_code=True)
    assert find_deployment(key, [TINY, trusting]) is trusting
    with pytest.raises(NotFound):
        find_deployment(replace(key, repo_id="edif/other"), [TINY])


def test_a_deployment_serves_its_own_keys() -> None:
    several = replace(TINY, more_tasks=("feature-extraction", "fill-mask"))
    for each in [TINY, several, replace(TINY, revision="v2", trust_remote_code=True)]:
        assert each.serves(each.model_key)
        assert [key.task for key in each.model_keys] == [*each.tasks]
        assert all(each.serves(key) for key in each.model_keys)
    assert not several.serves(replace(KEY, task="text-classification"))


def test_tasks_are_kept_once_and_by_the_name_that_clients_send() -> None:
    named = ["sentiment-analysis", "fill-mask", "text-classification", "ner"]
    assert each_task(named) == ("text-classification", "fill-mask", "token-classification")


def test_the_tasks_that_are_served_are_listed() -> None:
    several = replace(TINY, more_tasks=("fill-mask",), revision="v2")
    with pytest.raises(
        NotFound, match=r"edif/Tiny \(tasks text-generation and fill-mask, revision v2\)\."
    ):
        find_deployment(KEY, [several])


@pytest.mark.parametrize("name", ["a", "7", "tiny-gpt2", "a" * 40])
def test_a_name_fits_into_job_names_and_paths(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a/b", "..", "a" * 41, "a\n", "ä"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="must be 1-40 characters"):
        check_name(name)


@pytest.mark.parametrize(
    ("repo_id", "name"),
    [
        ("openai-community/gpt2", "gpt2"),
        ("meta-llama/Llama-3.1-8B", "llama-3-1-8b"),
        ("gpt2", "gpt2"),
        ("a/__", "model"),
        ("a/" + "x" * 39 + "-y", "x" * 39),
    ],
)
def test_a_name_is_made_from_the_repository(repo_id: str, name: str) -> None:
    assert default_name(repo_id) == name


@given(st.text())
def test_a_made_name_is_always_a_name(repo_id: str) -> None:
    check_name(default_name(repo_id))


def test_a_deployment_is_found_or_the_others_are_listed() -> None:
    other = replace(TINY, name="other", repo_id="edif/other", revision="v2")
    assert find_deployment(KEY, [other, TINY]) is TINY
    with pytest.raises(NotFound) as refusal:
        find_deployment(replace(KEY, repo_id="edif/big", revision="v3"), [TINY, other])
    assert str(refusal.value) == (
        "edif/big (task text-generation, revision v3) is not deployed here. Deployed: "
        "edif/other (task text-generation, revision v2), edif/Tiny (task text-generation)."
    )
    with pytest.raises(NotFound, match="Deployed: nothing yet"):
        find_deployment(KEY, [])


@pytest.mark.parametrize("device", ["cpu", "cuda", "cpu:0"])
def test_devices_that_are_served(device: str) -> None:
    assert check_device(device) == device


@pytest.mark.parametrize(
    ("device", "executors", "said"),
    [
        ("cuda:0,1", 1, "choose cpu, or cuda for GPUs of NVIDIA or AMD"),
        ("rocm", 1, "cuda for GPUs of NVIDIA or AMD"),
        ("cuda", 2, "one request at a time"),
    ],
)
def test_devices_that_are_refused(device: str, executors: int, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        check_device(device, executors=executors)


@pytest.mark.parametrize(
    ("weights", "device"),
    [("auto", "cpu"), ("private", "cuda"), ("shared", "cuda"), ("shared", "cpu:0")],
)
def test_ways_of_weights_that_are_taken(weights: str, device: str) -> None:
    assert check_weights(weights, device=device) == weights


@pytest.mark.parametrize(
    ("weights", "device", "said"),
    [("lent", "cuda", "choose one of: auto, private, shared"), ("shared", "cpu", "are for a GPU")],
)
def test_ways_of_weights_that_are_refused(weights: str, device: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        check_weights(weights, device=device)
