"""Objects in a bucket of an S3-compatible store: Ceph, MinIO, SeaweedFS, AWS.

The relay holds the credentials and makes, completes and aborts multipart uploads; parts go up and results come down by
URLs that it signs (Signature Version 4), so the bytes never pass through it.

A signature covers the host that the URL names, and the three who speak to a store may know it by three names:

    relay ───────► endpoint          everything that is not a signed URL
    worker ──────► worker_endpoint   PUT of a part, from inside the cluster
    researcher ──► public_endpoint   GET of a result, from anywhere

Objects are addressed by path (`endpoint/bucket/key`), which needs no DNS entry per bucket, and have no
`Content-Encoding`, which a client would undo. All lie below `prefix`, so a bucket may be shared: nothing outside
is read, listed or deleted.

This module is the only one that knows s3fs, from which it takes the S3 client and its connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError
from s3fs import S3FileSystem

from edif_hpc.errors import EdifError, InvalidInput, NotFound, SettingsError, Unavailable
from edif_hpc.objects.base import LINK_S, PART_BYTES, Upload, UploadedPart, check_key

CONNECT_S = 5.0
READ_S = 30.0
#: How long the existence of an object may take to look up before its URL is given without.
LOOK_S = 2.0

_GONE = {"NoSuchKey", "NoSuchUpload", "404", "NotFound"}
_NOT_AS_SAID = {"InvalidPart", "InvalidPartOrder", "EntityTooSmall", "MalformedXML"}
_HINTS = {
    "NoSuchBucket": "make the bucket, or correct s3_bucket",
    "InvalidBucketName": "correct s3_bucket",
    "AccessDenied": "allow this key to list, read, write and delete in the bucket",
    "InvalidAccessKeyId": "correct s3_access_key",
    "SignatureDoesNotMatch": "correct s3_secret_key or s3_region",
    "AuthorizationHeaderMalformed": "correct s3_region",
    "RequestTimeTooSkewed": "set this machine's clock",
    "QuotaExceeded": "the bucket is full: delete from it or raise its quota",
    "XMinioStorageFull": "the store is full",
}
#: Answers that no waiting changes: the relay does not start with them.
_MISCONFIGURED = set(_HINTS) - {"QuotaExceeded", "XMinioStorageFull"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A bucket, how to reach it, and as whom."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str = field(repr=False)
    region: str = "us-east-1"
    prefix: str = ""
    worker_endpoint: str | None = None
    public_endpoint: str | None = None
    link_s: float = LINK_S


class StoreRefuses(Unavailable):
    """The object store answers, and the answer is no; `s3_code` is its word for why."""

    code = "store_refuses"

    def __init__(self, message: str, *, s3_code: str) -> None:
        super().__init__(message)
        self.s3_code = s3_code


class S3Store:
    """Objects in a bucket. Make it with `connect`."""

    part_bytes = PART_BYTES

    def __init__(self, place: Place, *, calls: Any, workers: Any, public: Any) -> None:
        self._place = place
        self._calls, self._workers, self._public = calls, workers, public

    @classmethod
    async def connect(cls, place: Place) -> S3Store:
        """A store at `place`; speaks to nobody yet."""
        calls = await _client(place, place.endpoint)
        workers = await _client(place, place.worker_endpoint or place.endpoint)
        public = await _client(place, place.public_endpoint or place.endpoint)
        return cls(place, calls=calls, workers=workers, public=public)

    async def close(self) -> None:
        """Close the connections."""
        for each in (self._calls, self._workers, self._public):
            await each.close()

    async def check(self) -> None:
        """Try the bucket by beginning an upload and throwing it away, which also proves the right to write.

        Raises:
            SettingsError: the store says no in a way that waiting does not change.
            Unavailable: it does not answer, or not now.
        """
        try:
            await self.abort(await self.begin("check"))
        except StoreRefuses as error:
            if error.s3_code in _MISCONFIGURED:
                raise SettingsError(f"relay: results cannot be stored: {error}") from error
            raise

    async def make_bucket(self) -> None:
        """Make the bucket, for tests and for stores of one's own."""
        await self._call("create_bucket")

    # -- uploads -------------------------------------------------------------------------------------------------------

    async def begin(self, key: str) -> Upload:
        """Start a multipart upload."""
        path = self._path(key)
        made = await self._call(
            "create_multipart_upload", Key=path, ContentType="application/octet-stream"
        )
        return Upload(key=key, handle=made["UploadId"], part_bytes=self.part_bytes)

    async def resume(self, key: str) -> Upload | None:
        """The multipart upload of this key, found by listing."""
        path = self._path(key)
        found = await self._call("list_multipart_uploads", Prefix=path)
        handles = [each["UploadId"] for each in found.get("Uploads", ()) if each["Key"] == path]
        if not handles:
            return None
        return Upload(key=key, handle=handles[-1], part_bytes=self.part_bytes)

    async def part_urls(
        self,
        upload: Upload,
        first: int,
        count: int,
        *,
        base_url: str,  # noqa: ARG002 - the store has its own
    ) -> list[str]:
        """Signed PUT URLs of the bucket, as workers reach it."""
        urls = []
        for number in range(first, first + count):
            facts = {
                "Key": self._path(upload.key),
                "UploadId": upload.handle,
                "PartNumber": number,
            }
            urls.append(await self._sign(self._workers, "upload_part", facts))
            await asyncio.sleep(0)  # signing computes, and others wait for the loop
        return urls

    async def complete(
        self, upload: Upload, parts: Sequence[UploadedPart], size_bytes: int
    ) -> None:
        """Join the parts; the object is kept only if it has the size that was announced."""
        listed = [{"PartNumber": each.number, "ETag": each.etag} for each in parts]
        try:
            await self._call(
                "complete_multipart_upload",
                Key=self._path(upload.key),
                UploadId=upload.handle,
                MultipartUpload={"Parts": listed},
            )
        except (NotFound, Unavailable) as error:
            await self._settle(upload, size_bytes, error)
        found = await self.size(upload.key)
        if found != size_bytes:
            await self._call("delete_object", Key=self._path(upload.key))
            raise InvalidInput(
                f"the object {upload.key} has {found} bytes, the worker said {size_bytes}"
            )

    async def _settle(self, upload: Upload, size_bytes: int, error: EdifError) -> None:
        """Find out what a failed completion means: it may have been done before, or its answer was lost."""
        try:
            if await self.size(upload.key) == size_bytes:
                return
        except NotFound:
            # Some stores answer "internal error" for an upload that is over; this asks in another way.
            facts = {"Key": self._path(upload.key), "UploadId": upload.handle}
            await self._call("list_parts", MaxParts=1, **facts)
        raise error

    async def abort(self, upload: Upload) -> None:
        """Abort it, and let the store free its parts."""
        try:
            await self._call(
                "abort_multipart_upload", Key=self._path(upload.key), UploadId=upload.handle
            )
        except NotFound:
            return

    # -- objects -------------------------------------------------------------------------------------------------------

    async def size(self, key: str) -> int:
        """Ask for its head."""
        head = await self._call("head_object", Key=self._path(key))
        return int(head["ContentLength"])

    async def read_url(self, key: str, *, base_url: str) -> str:  # noqa: ARG002 - the store has its own
        """A signed GET URL of the bucket, as researchers reach it; also while the relay cannot."""
        try:
            async with asyncio.timeout(LOOK_S):
                await self.size(key)
        except (Unavailable, TimeoutError):
            pass
        return await self._sign(self._public, "get_object", {"Key": self._path(key)})

    async def delete(self, folder: str) -> None:
        """Delete what lies below a folder."""
        async for found in self._pages("list_objects_v2", f"{self._path(folder)}/"):
            for each in found.get("Contents", ()):
                await self._call("delete_object", Key=each["Key"])

    async def sweep(self, *, objects_before: float, uploads_before: float) -> int:
        """Delete old objects, and abort old uploads, of this prefix."""
        swept = 0
        async for found in self._pages("list_multipart_uploads", self._place.prefix):
            for each in _from_before(found.get("Uploads", ()), "Initiated", uploads_before):
                key = each["Key"].removeprefix(self._place.prefix)
                await self.abort(
                    Upload(key=key, handle=each["UploadId"], part_bytes=self.part_bytes)
                )
                swept += 1
        async for found in self._pages("list_objects_v2", self._place.prefix):
            for each in _from_before(found.get("Contents", ()), "LastModified", objects_before):
                await self._call("delete_object", Key=each["Key"])
                swept += 1
        return swept

    # -- inside --------------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return self._place.prefix + check_key(key)

    async def _sign(self, client: Any, operation: str, facts: dict[str, Any]) -> str:
        url: str = await client.generate_presigned_url(
            operation,
            Params={"Bucket": self._place.bucket, **facts},
            ExpiresIn=int(self._place.link_s),
        )
        return url

    async def _call(self, operation: str, **facts: Any) -> dict[str, Any]:
        with self._told(operation):
            answer: dict[str, Any] = await getattr(self._calls, operation)(
                Bucket=self._place.bucket, **facts
            )
            return answer

    async def _pages(self, operation: str, prefix: str) -> AsyncIterator[dict[str, Any]]:
        pages = self._calls.get_paginator(operation).paginate(
            Bucket=self._place.bucket, Prefix=prefix
        )
        with self._told(operation):
            async for page in pages:
                yield page

    @contextmanager
    def _told(self, operation: str) -> Iterator[None]:
        """What the store's errors mean to us."""
        where = f"the bucket {self._place.bucket} at {self._place.endpoint}"
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            text = f"{where} answers {operation} with {code} (HTTP {status})"
            if code in _GONE:
                raise NotFound(text) from error
            if code in _NOT_AS_SAID:
                raise InvalidInput(text) from error
            hint = _HINTS.get(code, "try again later")
            raise StoreRefuses(f"{text}: {hint}", s3_code=code) from error
        except (BotoCoreError, aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"{where} cannot be reached for {operation}: {error}") from error


async def _client(place: Place, endpoint: str) -> Any:
    system = S3FileSystem(
        key=place.access_key,
        secret=place.secret_key,
        endpoint_url=endpoint,
        client_kwargs={"region_name": place.region},
        config_kwargs={
            "signature_version": "s3v4",
            "s3": {"addressing_style": "path"},
            # Newer checksums in headers and trailers are not known to every store.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "connect_timeout": CONNECT_S,
            "read_timeout": READ_S,
            "retries": {"total_max_attempts": 2, "mode": "standard"},
        },
        asynchronous=True,
        skip_instance_cache=True,
    )
    return await system.set_session()


def _from_before(
    entries: Sequence[dict[str, Any]], name: str, before: float
) -> Iterator[dict[str, Any]]:
    for each in entries:
        moment: datetime = each[name]
        if moment.timestamp() < before:
            yield each
