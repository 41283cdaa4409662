"""Which object store a relay has, by its settings.

`s3_bucket` chooses the bucket, otherwise results lie below the data directory. A store that says no in a way that waiting
does not change (no such bucket, wrong key) ends the start. One that does not answer only earns a warning: a relay
must come up while its store is down, since requests can be accepted and workers keep their results.
"""

from __future__ import annotations

import logging

from edif_hpc.clock import Clock
from edif_hpc.errors import SettingsError, Unavailable
from edif_hpc.objects.base import ObjectStore
from edif_hpc.objects.directory import DirectoryStore
from edif_hpc.objects.signing import Signer
from edif_hpc.settings import RelaySettings

_log = logging.getLogger(__name__)


async def open_objects(settings: RelaySettings, *, signer: Signer, clock: Clock) -> ObjectStore:
    """The store that the settings name.

    Raises:
        SettingsError: the bucket cannot be used as it is set.
    """
    if settings.s3_bucket is None:
        return DirectoryStore(settings.data_dir / "results", signer=signer, clock=clock)
    return await _open_bucket(settings)


async def _open_bucket(settings: RelaySettings) -> ObjectStore:
    try:
        from edif_hpc.objects.s3 import Place, S3Store  # noqa: PLC0415 - heavy, and an extra
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"relay: s3_bucket is set, but {error.name} is not installed; install edif-hpc[s3]"
        ) from error
    place = Place(
        endpoint=settings.s3_endpoint or "",
        bucket=settings.s3_bucket or "",
        access_key=settings.s3_access_key or "",
        secret_key=settings.s3_secret_key or "",
        region=settings.s3_region,
        prefix=settings.s3_prefix,
        worker_endpoint=settings.s3_worker_endpoint,
        public_endpoint=settings.s3_public_endpoint,
        link_s=settings.s3_link_s,
    )
    store = await S3Store.connect(place)
    try:
        await store.check()
    except SettingsError:
        await store.close()
        raise
    except Unavailable as error:
        _log.error("results cannot be stored now: %s", error, extra={"event": "object_store_away"})
    return store
