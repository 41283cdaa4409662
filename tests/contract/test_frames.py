"""The frames that the relay writes without torch are the ones that nnsight reads with it."""

from __future__ import annotations

import os
import pickle
import pickletools
from typing import Any

import pytest
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.schema.response import ResponseModel, Status

from edif_hpc.domain.request import RequestState
from edif_hpc.relay.nnsight_schema import binary_frame, frame, text_frame
from edif_hpc.relay.sessions import LOG, Update

SIZES = [0, 1, 255, 256, 65_535, 65_536, (1 << 20) - 1, 1 << 20]
META: dict[Any, Any] = {
    "runtime": 0.5,
    "error": {"kind": RequestState.ERROR},
    3: [1, None, True, "ü"],
}


@pytest.mark.parametrize("size", SIZES)
def test_a_result_in_a_frame(size: int) -> None:
    data = os.urandom(size)
    update = Update(request_id="r1", status="COMPLETED", description="done", meta=META, data=data)
    found = ResponseModel.unpickle(frame(update))
    assert found.data == data
    assert (found.id, found.status, found.description) == ("r1", Status.COMPLETED, "done")
    assert found.meta == {"runtime": 0.5, "error": {"kind": "ERROR"}, "3": [1, None, True, "ü"]}


@pytest.mark.parametrize("size", SIZES)
def test_the_object_equals_torchs_own(size: int) -> None:
    """The same dictionary that nnsight's server side would have saved."""
    model = ResponseModel(id="r1", status=Status.COMPLETED, description="", data=bytes(size))
    update = Update(request_id="r1", status="COMPLETED", data=bytes(size))
    assert ResponseModel.unpickle(binary_frame(update)) == ResponseModel.unpickle(model.pickle())


@pytest.mark.parametrize("status", [*RequestState, LOG])
def test_every_status_as_text(status: str) -> None:
    update = Update(request_id="r1", status=status, description="a\nß", meta=META, data="http://x")
    content = frame(update)
    assert isinstance(content, str)
    found = RemoteBackend.parse(content)
    assert found.status.value == status
    assert (found.description, found.data) == ("a\nß", "http://x")
    assert found.meta is not None
    assert found.meta["3"] == [1, None, True, "ü"]


def test_bytes_never_go_as_text() -> None:
    with pytest.raises(TypeError):
        text_frame(Update(request_id="r1", status="COMPLETED", data=b"x"))


def test_a_frame_names_no_class() -> None:
    """Plain values only: nothing is imported when a frame is read."""
    content = binary_frame(
        Update(request_id="r1", status=RequestState.COMPLETED, meta=META, data=b"x")
    )
    start, operations = 0, set[str]()
    while start < len(content):
        pickled = list(pickletools.genops(content[start:]))
        operations |= {operation.name for operation, _, _ in pickled}
        start += (pickled[-1][2] or 0) + 1
    assert not operations & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "OBJ", "NEWOBJ", "BUILD"}


def test_meta_of_another_class_is_refused() -> None:
    with pytest.raises(TypeError):
        binary_frame(
            Update(request_id="r", status="COMPLETED", meta={"x": pickle.Pickler}, data=b"")
        )
