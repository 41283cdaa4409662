"""`edif-hpc hub`: what an operator sees and does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edif_hpc.objects.repository import read_manifest

if TYPE_CHECKING:
    from conftest import Relay

NAME = "lab/tiny"


def test_publish_list_and_remove(relay: Relay, tiny_gpt2: Path, tiny_llama: Path) -> None:
    assert relay.cli("hub", "ls").startswith("nothing here")
    commit = read_manifest(tiny_gpt2).commit
    assert f"published {NAME} at {commit}" in relay.cli("hub", "publish", NAME, str(tiny_gpt2))
    relay.deploy("lab/llama", tiny_llama, trust_remote_code=True)
    relay.restart()
    found = {each["repo_id"]: each for each in json.loads(relay.cli("hub", "ls", "--json"))}
    assert found[NAME] == {
        "repo_id": NAME,
        "commit": commit,
        "task": "text-generation",
        "weights": False,
        "code": False,
        "size_bytes": found[NAME]["size_bytes"],
        "from": "published",
    }
    assert found["lab/llama"]["from"] == str(tiny_llama)
    assert found["lab/llama"]["code"] is True
    with_weights = json.loads(
        relay.cli("hub", "publish", NAME, str(tiny_gpt2), "--weights", "--json")
    )
    assert with_weights["size_bytes"] > found[NAME]["size_bytes"]
    relay.cli("hub", "rm", NAME)
    assert NAME not in relay.cli("hub", "ls")
    assert "published: nothing" in relay.cli("hub", "rm", NAME, code=3)


def test_a_folder_that_is_no_model(relay: Relay, tmp_path: Path) -> None:
    assert "no config.json" in relay.cli("hub", "publish", NAME, str(tmp_path), code=3)
    assert "ORG/NAME" in relay.cli("hub", "rm", "gpt2", code=3)


def test_only_an_operator_publishes(relay: Relay) -> None:
    with relay.http() as operator:
        told = operator.post("/api/tokens", json={"name": "ada"}).json()["token"]
    with relay.http(told) as researcher, relay.http(token="") as nobody:
        for http, status in ((researcher, 403), (nobody, 401)):
            assert http.get("/api/hub").status_code == status
            assert http.post("/api/hub", json={}).status_code == status
            assert http.put("/api/hub/uploads/x/config.json").status_code == status
            assert http.post("/api/hub/uploads/x").status_code == status
            assert http.delete("/api/hub/lab/tiny").status_code == status


@pytest.mark.parametrize(
    ("content", "status", "text"),
    [
        (b"x" * 6, 400, "more than the 5 bytes"),
        (b"x" * 3_000_000, 400, "more than the 5 bytes"),
        (b"x" * 4, 400, "arrived with 4 of 5 bytes"),
        (b"x" * 5, 400, "changed on the way"),
    ],
)
def test_a_file_that_is_not_the_announced_one(
    relay: Relay, content: bytes, status: int, text: str
) -> None:
    announced = {"config.json": {"size_bytes": 5, "digest": "0" * 64}}
    body = {"repo_id": NAME, "task": "text-generation", "files": announced}
    with relay.http() as http:
        begun = http.post("/api/hub", json=body).json()
        assert begun["missing"] == ["config.json"]
        place = f"/api/hub/uploads/{begun['upload']}"
        answer = http.put(f"{place}/config.json", content=content)
        assert (answer.status_code, text in answer.json()["detail"]) == (status, True)
        assert "files are missing" in http.post(place).json()["detail"]
        assert http.get("/api/hub").json() == {"models": []}
    assert list((relay.data_dir / "hub").rglob("*.part")) == []
