from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from edif_hpc.testing.hub import Hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "extra").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "extra" / "notes.txt").write_text("0123456789")
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "F32", "shape": [], "data_offsets": [24, 28]},
        }
    ).encode()
    length = len(header).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(length + header + bytes(28))
    return folder


@pytest.fixture
def client(folder: Path) -> TestClient:
    return TestClient(Hub({"org/model": folder}, {"model": "org/model"}).app())


@pytest.mark.parametrize("path", ["org/model", "model", "org/model/revision/main"])
def test_record_is_canonical_whatever_the_spelling(client: TestClient, path: str) -> None:
    record = client.get(f"/api/models/{path}").json()
    assert record["id"] == "org/model"
    assert [s["rfilename"] for s in record["siblings"]] == [
        "config.json",
        "extra/notes.txt",
        "model.safetensors",
    ]
    assert record["safetensors"]["total"] == 7
    by_commit = client.get(f"/api/models/org/model/revision/{record['sha']}")
    assert by_commit.json() == record


def test_head_carries_what_the_cache_is_keyed_by(client: TestClient) -> None:
    commit = client.get("/api/models/org/model").json()["sha"]
    head = client.head("/org/model/resolve/main/extra/notes.txt")
    assert head.headers["Content-Length"] == "10"
    assert head.headers["X-Repo-Commit"] == commit
    assert len(head.headers["ETag"]) > 10
    assert head.content == b""


def test_files_and_ranges(client: TestClient) -> None:
    url = "/model/resolve/main/extra/notes.txt"
    assert client.get(url).content == b"0123456789"
    part = client.get(url, headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")


def test_commit_follows_the_contents(client: TestClient, folder: Path) -> None:
    before = client.get("/api/models/org/model").json()["sha"]
    (folder / "config.json").write_text('{"changed": true}')
    changed = TestClient(Hub({"org/model": folder}, {}).app())
    assert changed.get("/api/models/org/model").json()["sha"] != before


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/api/models/org/other", "RepoNotFound"),
        ("/other/resolve/main/config.json", "RepoNotFound"),
        ("/org/model/resolve/v2/config.json", "RevisionNotFound"),
        ("/org/model/resolve/main/absent.json", "EntryNotFound"),
        ("/org/model/resolve/main/%2e%2e/%2e%2e/secret", "EntryNotFound"),
        ("/api/models/org/model/tree/main/absent", "EntryNotFound"),
    ],
)
def test_what_is_missing_says_so_in_the_hubs_words(
    client: TestClient, path: str, code: str
) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, code)


def test_tree_lists_a_folder(client: TestClient) -> None:
    entries = client.get("/api/models/org/model/tree/main/extra").json()
    assert [(e["type"], e["path"], e["size"]) for e in entries] == [
        ("file", "extra/notes.txt", 10)
    ]
