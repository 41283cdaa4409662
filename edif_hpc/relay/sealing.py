"""Sealing: from the first part that a worker wants to put, to an object that is durable.

The parts go from the worker to the store by signed URLs. The relay begins the upload when the first URL is asked for,
and joins the parts when the worker says `Done`; only a sealed result may become COMPLETED. An upload outlives the relay:
what is not remembered here is looked up in the store by its key, which holds request and attempt.

A store that is away or full is met with patience: the worker keeps its file and asks again, and the request ends in an
error only when that has lasted `patience_s`. Parts that do not add up are put again.
"""

from __future__ import annotations

import logging

from edif_hpc.clock import Clock
from edif_hpc.domain.request import Failure, FailureKind
from edif_hpc.errors import EdifError, InvalidInput, NotFound, Unavailable
from edif_hpc.objects.base import ObjectStore, Upload, UploadedPart
from edif_hpc.relay.board import Open
from edif_hpc.wire import messages as m

_log = logging.getLogger(__name__)

_REASON_CHARS = 200


def object_key(request_id: str, attempt: int) -> str:
    """Where an attempt's result lies."""
    return f"{request_id}/{attempt}"


class Sealing:
    """Uploads of results."""

    def __init__(self, *, objects: ObjectStore, clock: Clock, patience_s: float) -> None:
        self._objects, self._clock = objects, clock
        self._patience_s = patience_s

    async def urls(self, entry: Open, need: m.Need, base_url: str) -> m.Parts:
        """URLs for the parts of a result, or why there are none now."""
        key = object_key(need.request, need.attempt)
        try:
            async with entry.uploading:  # two questions must not begin two uploads
                if entry.upload is not None and entry.upload.key != key:
                    await self.abort(entry)  # of an attempt that is over
                if entry.upload is None:
                    entry.upload = await self._upload(key, need.first)
                upload = entry.upload
            urls = await self._objects.part_urls(upload, need.first, need.count, base_url=base_url)
        except Unavailable as error:
            return _parts(need, [], refusal=error.told[:_REASON_CHARS])
        return _parts(need, urls)

    async def seal(self, entry: Open, done: m.Done) -> m.Reupload | Failure | None:
        """Make an uploaded result durable; returns what is to be done instead, if that is not possible.

        Raises:
            Unavailable: the store cannot do it now; the worker says `Done` again later.
        """
        try:
            await self._seal(entry, done)
        except EdifError as error:
            _log.warning(
                "a result is not sealed",
                extra={"event": "seal_failed", "request": done.request, "reason": str(error)},
            )
            if self._patience_is_over(entry):
                return _given_up(error, self._patience_s)
            if isinstance(error, Unavailable):
                raise
            await self.abort(entry)
            return m.Reupload(request=done.request, attempt=done.attempt)
        return None

    async def abort(self, entry: Open) -> None:
        """Throw an entry's upload away. What the store will not hear of now, its sweep finds later."""
        upload, entry.upload = entry.upload, None
        if upload is None:
            return
        try:
            await self._objects.abort(upload)
        except Unavailable as error:
            _log.warning(
                "an upload was left behind",
                extra={"event": "abort_failed", "key": upload.key, "reason": str(error)},
            )

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _upload(self, key: str, first: int) -> Upload:
        # Who asks for later parts has put the earlier ones, through a relay that was restarted since.
        found = await self._objects.resume(key) if first > 1 else None
        return found if found is not None else await self._objects.begin(key)

    async def _seal(self, entry: Open, done: m.Done) -> None:
        key = object_key(done.request, done.attempt)
        if entry.upload is None or entry.upload.key != key:
            if await self._is_there(key, done.size):
                return
            entry.upload = await self._objects.resume(key)
        if entry.upload is None:
            raise NotFound(f"there is no upload of {key}")
        parts = [UploadedPart(number=each.number, etag=each.etag) for each in done.parts or []]
        await self._objects.complete(entry.upload, parts, done.size)

    async def _is_there(self, key: str, size_bytes: int) -> bool:
        try:
            return await self._objects.size(key) == size_bytes
        except NotFound:
            return False

    def _patience_is_over(self, entry: Open) -> bool:
        now = self._clock.monotonic()
        if entry.unsealed_since is None:
            entry.unsealed_since = now
        return now - entry.unsealed_since > self._patience_s


def _parts(need: m.Need, urls: list[str], *, refusal: str = "") -> m.Parts:
    return m.Parts(
        request=need.request, attempt=need.attempt, first=need.first, urls=urls, refusal=refusal
    )


def _given_up(error: EdifError, patience_s: float) -> Failure:
    what = (
        "never added up" if isinstance(error, InvalidInput | NotFound) else "could not be stored"
    )
    return Failure(
        kind=FailureKind.ENGINE,
        message=f"the code has run, but its result {what} in {patience_s:.0f} s of trying: {error.told}. "
        "Tell the operator, and send it again when the store works.",
    )
