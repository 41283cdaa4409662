"""The hub's routes over a shelf and deployments on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient

from edif_hpc.domain.adapter import Adapter
from edif_hpc.domain.deployment import Deployment
from edif_hpc.errors import InvalidInput, NotFound, StoreUnavailable, TooLarge
from edif_hpc.objects.repository import read_manifest
from edif_hpc.relay.hub import Hub
from edif_hpc.relay.hub_catalog import Catalog, Patterns
from edif_hpc.relay.hub_shelf import Description, Repo, Shelf

NAME = "org/model"
LIMIT_BYTES = 10_000


class Elsewhere:
    """A hub behind ours that remembers what it was asked."""

    def __init__(self, *names: str) -> None:
        self.names, self.asked = names, list[str]()

    def allows(self, name: str) -> bool:
        return name in self.names

    async def record(self, http: Request) -> Response:
        self.asked.append(http.url.path)
        return Response("elsewhere")

    file = record


async def on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)


def model(folder: Path, config: str = "{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(24)
    (folder / "config.json").write_text(config)
    (folder / "vocab.txt").write_text("0123456789")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "modeling.py").write_text("pass")
    (folder / "notes.txt").write_text("private")
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / "a.jinja").write_text("a")
    return folder


def describe(folder: Path, name: str = NAME, **more: Any) -> Description:
    manifest = read_manifest(folder)
    facts = {"task": "text-generation", "parameters": manifest.parameters} | more
    return Description(repo_id=name, files=manifest.files, **facts)


def send(shelf: Shelf, handle: str, name: str, content: bytes) -> None:
    part, _ = shelf.place(handle, name)
    part.write_bytes(content)
    shelf.arrived(handle, name, part)


def publish(shelf: Shelf, folder: Path, name: str = NAME, **more: Any) -> Repo:
    handle, missing = shelf.begin(describe(folder, name, **more))
    for each in missing:
        send(shelf, handle, each, (folder / each).read_bytes())
    return shelf.finish(handle)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model(tmp_path / "model")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "data" / "hub", max_bytes=LIMIT_BYTES)


class World:
    def __init__(self, shelf: Shelf) -> None:
        self.deployments: list[Deployment] = []
        self.elsewhere = Elsewhere("org/allowed", "gpt2")
        catalog = Catalog(
            shelf=shelf,
            deployments=lambda: self.deployments,
            weights=Patterns.parse("open/*"),
        )
        hub = Hub(catalog=catalog, elsewhere=self.elsewhere, accounts=None)
        self.app = Starlette(routes=hub.routes(), exception_handlers={HTTPException: on_http})

    def deploy(self, source: Path | None, repo_id: str = NAME, **more: Any) -> None:
        facts: dict[str, Any] = {"name": "d", "revision": None, "task": "text-generation"} | more
        self.deployments.append(
            Deployment(repo_id=repo_id, source=str(source) if source else None, **facts)
        )


@pytest.fixture
def world(shelf: Shelf) -> World:
    return World(shelf)


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    with TestClient(world.app, base_url="http://relay/hub/") as client:
        yield client


# -- what is shown ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["org/model", "ORG/Model", "org/model/revision/main"])
def test_a_deployed_folder_has_a_record(
    client: TestClient, world: World, folder: Path, path: str
) -> None:
    world.deploy(folder, task="feature-extraction")
    record = client.get(f"api/models/{path}").json()
    assert record["id"] == NAME
    assert record["sha"] == read_manifest(folder).commit
    assert record["pipeline_tag"] == "feature-extraction"
    assert record["safetensors"] == {"parameters": {"F32": 6}, "total": 6}
    files = [each["rfilename"] for each in record["siblings"]]
    assert files == ["config.json", "vocab.txt", "additional_chat_templates/a.jinja"]
    assert client.get(f"api/models/{NAME}/revision/{record['sha']}").json() == record


def test_files_have_what_a_cache_is_keyed_by(
    client: TestClient, world: World, folder: Path
) -> None:
    world.deploy(folder)
    head = client.head(f"{NAME}/resolve/main/vocab.txt")
    assert head.headers["content-length"] == "10"
    assert head.headers["x-repo-commit"] == read_manifest(folder).commit
    assert head.headers["etag"] == f'"{hashlib.sha256(b"0123456789").hexdigest()}"'
    assert head.content == b""
    assert client.get(f"{NAME}/resolve/main/vocab.txt").content == b"0123456789"
    part = client.get(f"{NAME}/resolve/main/vocab.txt", headers={"range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")


def test_a_changed_folder_has_a_new_commit(client: TestClient, world: World, folder: Path) -> None:
    world.deploy(folder)
    before = client.get(f"api/models/{NAME}").json()["sha"]
    (folder / "config.json").write_text('{"changed": true}')
    assert client.get(f"api/models/{NAME}").json()["sha"] == read_manifest(folder).commit != before
    gone = client.get(f"{NAME}/resolve/{before}/config.json")
    assert gone.headers["x-error-code"] == "RevisionNotFound"


def test_weights_and_code_only_where_the_operator_says(
    client: TestClient, world: World, folder: Path
) -> None:
    world.deploy(folder)
    world.deploy(folder, "open/model", name="e")
    world.deploy(folder, "code/model", name="f", trust_remote_code=True)
    for name, weights, code in (
        (NAME, 404, 404),
        ("open/model", 200, 404),
        ("code/model", 404, 200),
    ):
        assert client.get(f"{name}/resolve/main/model.safetensors").status_code == weights
        assert client.get(f"{name}/resolve/main/modeling.py").status_code == code


def test_what_may_come_is_not_noted_as_absent(
    client: TestClient, world: World, folder: Path
) -> None:
    """A client keeps for good what a commit does not have."""
    world.deploy(folder)
    kept = client.head(f"{NAME}/resolve/main/model.safetensors")
    assert "x-repo-commit" not in kept.headers
    assert "not published" in kept.headers["x-error-message"]
    absent = client.head(f"{NAME}/resolve/main/merges.txt")
    assert absent.headers["x-repo-commit"] == read_manifest(folder).commit


def test_a_revision_of_a_deployment(client: TestClient, world: World, tmp_path: Path) -> None:
    new, old = model(tmp_path / "new", "[1]"), model(tmp_path / "old", "[2]")
    world.deploy(old, name="old", revision="v1")
    assert client.get(f"{NAME}/resolve/v1/config.json").text == "[2]"
    world.deploy(new, name="new")
    assert client.get(f"{NAME}/resolve/main/config.json").text == "[1]"
    assert client.get(f"{NAME}/resolve/v1/config.json").text == "[2]"
    assert client.get(f"api/models/{NAME}").json()["sha"] == read_manifest(new).commit
    answer = client.get(f"{NAME}/resolve/v2/config.json")
    assert answer.headers["x-error-code"] == "RevisionNotFound"
    assert "main" in answer.headers["x-error-message"]


def test_trees(client: TestClient, world: World, folder: Path) -> None:
    world.deploy(folder)
    root = client.get(f"api/models/{NAME}/tree/main").json()
    assert [(each["type"], each["path"]) for each in root] == [
        ("file", "config.json"),
        ("file", "vocab.txt"),
        ("directory", "additional_chat_templates"),
    ]
    every = client.get(f"api/models/{NAME}/tree/main", params={"recursive": "True"}).json()
    assert "additional_chat_templates/a.jinja" in [each["path"] for each in every]
    below = client.get(f"api/models/{NAME}/tree/main/additional_chat_templates").json()
    assert [(each["path"], each["size"]) for each in below] == [
        ("additional_chat_templates/a.jinja", 1)
    ]
    missing = client.get(f"api/models/{NAME}/tree/main/absent")
    assert missing.headers["x-error-code"] == "EntryNotFound"


@pytest.mark.parametrize(
    "file",
    [
        "notes.txt",
        "%2e%2e/%2e%2e/secret",
        "%2e%2e%2fsecret",
        "/etc/passwd",
        "vocab.txt/",
        "additional_chat_templates",
        ".repository.json",
    ],
)
def test_nothing_else_is_reachable(
    client: TestClient, world: World, shelf: Shelf, folder: Path, file: str
) -> None:
    (folder.parent / "secret").write_text("secret")
    publish(shelf, folder)
    world.deploy(folder, "org/other")
    for name in (NAME, "org/other"):
        answer = client.get(f"http://relay/hub/{name}/resolve/main/{file}")
        assert (answer.status_code, answer.headers["x-error-code"]) == (404, "EntryNotFound")


def test_a_folder_that_is_no_model_is_shown_as_absent(
    client: TestClient, world: World, folder: Path
) -> None:
    world.deploy(folder)
    (folder / "model.safetensors").write_bytes(b"half")
    answer = client.get(f"api/models/{NAME}")
    assert answer.headers["x-error-code"] == "RepoNotFound"
    assert "hub publish" in answer.headers["x-error-message"]


def test_a_relative_source_is_no_folder_of_the_relay(
    client: TestClient, world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    world.deploy(Path("model"))
    assert client.get(f"api/models/{NAME}").status_code == 404


# -- elsewhere ----------------------------------------------------------------------------------


def test_who_is_asked(client: TestClient, world: World, folder: Path) -> None:
    world.deploy(folder)
    world.deploy(None, "org/deployed", name="e")
    world.deploy(Path("/cluster/model"), "org/allowed", name="f")
    for name in (NAME, "org/allowed", "org/foreign"):
        client.get(f"api/models/{name}")
        client.get(f"{name}/resolve/main/config.json")
    assert world.elsewhere.asked == [], "a name that means a folder, or is not listed, stays here"
    world.deploy(None, "org/more", name="g", adapters=(Adapter(repo_id="org/lora"),))
    for path in (
        "api/models/gpt2",
        "api/models/org/deployed",
        "org/deployed/resolve/main/x.json",
        "org/lora/resolve/main/adapter_config.json",
    ):
        assert client.get(path).text == "elsewhere"
    assert len(world.elsewhere.asked) == 4


def test_an_unknown_name_lists_what_is_here(
    client: TestClient, world: World, shelf: Shelf, folder: Path
) -> None:
    publish(shelf, folder, "org/published")
    world.deploy(folder)
    answer = client.get("api/models/org/unknown")
    assert answer.headers["x-error-code"] == "RepoNotFound"
    assert answer.json()["detail"].endswith("Here is: org/model, org/published")


@pytest.mark.parametrize("name", ["org/%e2%82%ac", "org/%0aX-Evil%3a%201", "org/%0d", "%00"])
def test_an_unprintable_name_is_answered(client: TestClient, name: str) -> None:
    answer = client.get(f"api/models/{name}")
    assert answer.status_code == 404
    assert "x-evil" not in answer.headers


# -- the shelf ----------------------------------------------------------------------------------


def test_publish_replace_and_remove(client: TestClient, shelf: Shelf, tmp_path: Path) -> None:
    first, second, third = (model(tmp_path / each, f"[{each}]") for each in "123")
    publish(shelf, first)
    assert client.get(f"{NAME}/resolve/main/config.json").text == "[1]"
    publish(shelf, second, "Org/Model")
    assert client.get(f"{NAME}/resolve/main/config.json").text == "[2]"
    assert client.get(f"api/models/{NAME}").json()["id"] == "Org/Model"
    old = read_manifest(first).commit
    assert client.get(f"{NAME}/resolve/{old}/config.json").text == "[1]", "a download can finish"
    home = publish(shelf, third).root.parent
    assert len(list(home.iterdir())) == 3, "the pointer, the shown one and the one before"
    assert client.get(f"{NAME}/resolve/{old}/config.json").status_code == 404
    shelf.remove("ORG/MODEL")
    assert client.get(f"{NAME}/resolve/main/config.json").status_code == 404
    with pytest.raises(NotFound, match="published: nothing"):
        shelf.remove(NAME)


def test_a_published_model_comes_before_a_deployed_folder(
    client: TestClient, world: World, shelf: Shelf, tmp_path: Path
) -> None:
    world.deploy(model(tmp_path / "deployed", "[1]"))
    publish(shelf, model(tmp_path / "published", "[2]"))
    assert client.get(f"{NAME}/resolve/main/config.json").text == "[2]"


def test_it_is_there_after_a_restart(shelf: Shelf, tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "data" / "hub"
    publish(shelf, folder)
    publish(shelf, model(folder, "[2]"), weights=True)
    handle, _ = shelf.begin(describe(model(folder, "[3]")))
    orphan = root / "org" / "unfinished" / handle
    orphan.mkdir(parents=True)
    again = Shelf(root, max_bytes=LIMIT_BYTES)
    assert again.repos() == shelf.repos()
    assert not orphan.exists()
    assert not (root / ".uploads").exists()
    assert len(list((root / "org" / "model").iterdir())) == 2, "the pointer, and what it names"


def test_a_damaged_publication_says_what_to_do(shelf: Shelf, tmp_path: Path, folder: Path) -> None:
    repo = publish(shelf, folder)
    (repo.root / ".repository.json").write_text("{")
    with pytest.raises(StoreUnavailable, match="remove that folder"):
        Shelf(tmp_path / "data" / "hub", max_bytes=LIMIT_BYTES)


def test_until_all_has_arrived_nothing_changes(shelf: Shelf, tmp_path: Path) -> None:
    publish(shelf, model(tmp_path / "old", "[1]"))
    new = model(tmp_path / "new", "[2]")
    handle, missing = shelf.begin(describe(new))
    assert missing == ["config.json"], "what is published already need not be sent again"
    with pytest.raises(InvalidInput, match=r"missing: config\.json"):
        shelf.finish(handle)
    with pytest.raises(InvalidInput, match=r"config\.json arrived with 3 of 3 bytes, or changed"):
        send(shelf, handle, "config.json", b"[3]")
    assert shelf.repos()[0].manifest.commit == read_manifest(tmp_path / "old").commit
    send(shelf, handle, "config.json", b"[2]")
    assert shelf.finish(handle).manifest == read_manifest(new)
    with pytest.raises(NotFound, match="publish again"):
        shelf.finish(handle)


def test_only_what_is_published_is_asked_for(shelf: Shelf, folder: Path) -> None:
    small = ["additional_chat_templates/a.jinja", "config.json", "vocab.txt"]
    handle, missing = shelf.begin(describe(folder))
    assert missing == small
    for name in ("model.safetensors", "../x", "notes.txt"):
        with pytest.raises(NotFound, match="announced without"):
            shelf.place(handle, name)
    assert shelf.begin(describe(folder, weights=True, code=True))[1] == sorted(
        [*small, "model.safetensors", "modeling.py"]
    )
    assert shelf.begin(describe(folder))[0] != handle


def test_a_model_above_the_limit_is_refused(shelf: Shelf, folder: Path) -> None:
    (folder / "vocab.txt").write_text("x" * (LIMIT_BYTES + 1))
    with pytest.raises(TooLarge, match="hub_max_bytes"):
        shelf.begin(describe(folder))


@pytest.mark.parametrize("name", ["gpt2", "../x", "a/../b", "org/model/x"])
def test_a_name_that_is_none_is_refused(shelf: Shelf, folder: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="ORG/NAME"):
        shelf.begin(describe(folder, name))


def test_uploads_that_never_end_make_room(shelf: Shelf, folder: Path) -> None:
    handles = [shelf.begin(describe(folder))[0] for _ in range(20)]
    with pytest.raises(NotFound, match="publish again"):
        shelf.place(handles[0], "config.json")
    shelf.place(handles[-1], "config.json")


@pytest.mark.parametrize(
    ("text", "name", "match"),
    [
        ("", "org/a", False),
        ("org/*", "Org/A", True),
        ("x/y, org/a", "org/a", True),
        ("x/y\norg/a", "org/b", False),
        ("*", "gpt2", True),
    ],
)
def test_patterns(text: str, name: str, *, match: bool) -> None:
    assert Patterns.parse(text).match(name) is match
