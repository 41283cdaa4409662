"""Signed links: results out, parts in, blobs for workers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from edif_hpc.objects.base import UploadedPart

if TYPE_CHECKING:
    from conftest import Relay

MIB = 1 << 20
DATA = bytes(range(256)) * 4


def result_of(relay: Relay, data: bytes, *, inline: bool) -> str:
    """A request whose result is `data`; returns the path of its link."""
    request_id: str = relay.post().json()["id"]
    key = f"{request_id}/1"
    if not inline:
        relay.objects.path(key).parent.mkdir(parents=True)
        relay.objects.path(key).write_bytes(data)
    relay.broker.complete(request_id, data if inline else key, len(data))
    return f"/results/{request_id}"


@pytest.mark.parametrize("inline", [True, False])
def test_a_result_comes_whole(relay: Relay, inline: bool) -> None:
    path = result_of(relay, DATA, inline=inline)
    with relay.client() as client:
        answer = client.get(relay.link("GET", path))
        head = client.head(relay.link("GET", path))
    assert answer.status_code == 200
    assert answer.content == DATA
    assert answer.headers["content-length"] == head.headers["content-length"] == str(len(DATA))
    assert "content-encoding" not in answer.headers
    assert head.content == b""


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-99", 10, 100),
        ("bytes=1000-", 1000, 1024),
        ("bytes=-24", 1000, 1024),
        ("bytes=1000-9999", 1000, 1024),
    ],
)
def test_a_range(relay: Relay, inline: bool, asked: str, start: int, stop: int) -> None:
    path = result_of(relay, DATA, inline=inline)
    with relay.client() as client:
        answer = client.get(relay.link("GET", path), headers={"range": asked})
    assert answer.status_code == 206
    assert answer.content == DATA[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/1024"


@pytest.mark.parametrize("inline", [True, False])
def test_a_range_beyond_the_end(relay: Relay, inline: bool) -> None:
    path = result_of(relay, DATA, inline=inline)
    with relay.client() as client:
        answer = client.get(relay.link("GET", path), headers={"range": "bytes=1024-"})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == "bytes */1024"


@pytest.mark.parametrize("path", ["/results/{}", "/objects/{}/1", "/blobs/{}"])
def test_links_are_checked(relay: Relay, path: str) -> None:
    path = path.format("0" * 32)
    good, expired = relay.link("GET", path), relay.link("GET", path, expires_in_s=-1)
    wrong = [
        path,
        f"{path}?expires=&sig=",
        good.replace("sig=", "sig=0"),
        good.replace("expires=1", "expires=2"),
        good.replace("00000", "00001", 1),
        relay.link("PUT", path),
        f"{path}?expires=1&sig=%C3%A9",
        f"{path}?expires=%D9%A1&sig=a",
    ]
    with relay.client() as client:
        for each in wrong:
            answer = client.get(each)
            assert (answer.status_code, answer.json()["code"]) == (403, "not_permitted"), each
        late = client.get(expired)
        assert late.status_code == 403
        assert "expired" in late.json()["detail"]
        missing = client.get(good)
        assert missing.status_code == 404
        assert "0" * 32 in missing.json()["detail"]


def test_a_missing_file_is_told(relay: Relay) -> None:
    path = result_of(relay, DATA, inline=False)
    relay.objects.path(path.removeprefix("/results/") + "/1").unlink()
    with relay.client() as client:
        answer = client.get(relay.link("GET", path))
    assert answer.status_code == 404
    assert "is not there" in answer.json()["detail"]


def test_no_way_out_of_the_folder(relay: Relay) -> None:
    with relay.client() as client:
        for path in ("/objects/../../etc/passwd", "/objects/..%2f..%2fetc%2fpasswd"):
            assert client.get(relay.link("GET", path)).status_code in (400, 403, 404)


def test_a_blob_for_a_worker(relay: Relay) -> None:
    blob = os.urandom(2 * MIB)
    request_id = relay.post(blob=blob).json()["id"]
    with relay.client() as client:
        assert client.get(relay.link("GET", f"/blobs/{request_id}")).content == blob


def test_parts_become_an_object(relay: Relay) -> None:
    """Parts of 3 MiB, put out of order, the last one shorter."""
    data = os.urandom(7 * MIB)
    upload = relay.run(relay.objects.begin("r/1"))
    urls = relay.run(relay.objects.part_urls(upload, 1, 3, base_url=relay.url))
    pieces = [data[start : start + 3 * MIB] for start in range(0, len(data), 3 * MIB)]
    parts = []
    with relay.client() as client:
        for number in (2, 3, 1):
            answer = client.put(urls[number - 1], content=pieces[number - 1])
            assert answer.status_code == 200, answer.text
            etag = answer.headers["etag"]
            parts.append(UploadedPart(number=number, etag=etag))
        relay.run(relay.objects.complete(upload, parts, len(data)))
        assert client.get(relay.link("GET", "/objects/r/1")).content == data
        assert client.put(urls[0], content=b"late").status_code == 404


def test_a_part_has_a_limit(relay: Relay) -> None:
    upload = relay.run(relay.objects.begin("r/1"))
    [url] = relay.run(relay.objects.part_urls(upload, 1, 1, base_url=relay.url))

    def pieces() -> object:
        for _ in range(20):
            yield bytes(MIB)

    with relay.client() as client:
        told = client.put(url, content=bytes(20 * MIB))
        untold = client.put(url, content=pieces())  # type: ignore[arg-type]
    assert (told.status_code, untold.status_code) == (413, 413)
    path, _ = relay.objects.part_path(upload.handle, 1)
    assert path.stat().st_size <= 3 * MIB


def test_a_part_needs_its_own_link(relay: Relay) -> None:
    upload = relay.run(relay.objects.begin("r/1"))
    [url] = relay.run(relay.objects.part_urls(upload, 1, 1, base_url=relay.url))
    with relay.client() as client:
        other = client.put(url.replace("/1?", "/2?"), content=b"x")
        zero = client.put(relay.link("PUT", f"/uploads/{upload.handle}/0"), content=b"x")
        nowhere = client.put(relay.link("PUT", "/uploads/..%2fx/1"), content=b"x")
    assert (other.status_code, zero.status_code) == (403, 400)
    assert nowhere.status_code in (403, 404)
