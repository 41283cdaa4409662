"""Values to rows and back: what the SQL store writes, and JSON for both stores.

A row is anything that gives a column by its name. JSON is text, so that any database can hold it;
flags are 0 and 1. The shipped fake sends its free-form values through `as_stored`, so that it
gives back what a database would (a tuple becomes a list).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Final, Protocol, TypeVar

from edif_hpc.domain.adapter import Adapter
from edif_hpc.domain.allocation import (
    Allocation,
    AllocationEvent,
    AllocationState,
    Peer,
    PeerRole,
)
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.limits import Allowed
from edif_hpc.domain.people import Role, Token
from edif_hpc.domain.request import (
    Failure,
    FailureKind,
    Limits,
    NewRequest,
    Request,
    RequestState,
    ResultRef,
)
from edif_hpc.errors import InvalidInput
from edif_hpc.store.base import Attempt, Charge
from edif_hpc.store.rules import Stored

EMPTY: Final = "{}"

_V = TypeVar("_V", Deployment, Token, Allocation, Peer, Charge)


class Row(Protocol):
    """A row of a result, by column name."""

    def __getitem__(self, column: str, /) -> Any:
        """The value in a column."""
        ...


def encode(value: Mapping[str, Any]) -> str:
    """A mapping as JSON text; raise `InvalidInput` if JSON cannot hold it."""
    if not value:
        return EMPTY
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"{sorted(map(str, value))} hold a value that cannot be stored as JSON ({error}); "
            "use numbers, text, lists and mappings"
        ) from error


def decode(text: str) -> dict[str, Any]:
    """A mapping that `encode` wrote."""
    return {} if text == EMPTY else json.loads(text)


def as_stored(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as it comes back from a store."""
    return decode(encode(value))


# -- requests ------------------------------------------------------------------------------------


def new_request_params(new: NewRequest) -> dict[str, Any]:
    """What `insert_request` binds."""
    values = {each.name: getattr(new, each.name) for each in fields(new)}
    values["env"] = encode(new.env)
    values["client"] = encode(new.client)
    values["limits"] = encode(asdict(new.limits))
    return values


def request_params(request: Request) -> dict[str, Any]:
    """What `update_request` binds."""
    result, failure = request.result, request.failure
    return {
        "id": request.id,
        "state": request.state.value,
        "attempt": request.attempt,
        "crashes": request.crashes,
        "holder": request.holder,
        "ended_at": request.ended_at,
        "failure": None if failure is None else encode(asdict(failure)),
        "result_bytes": None if result is None else result.size_bytes,
        "result_key": None if result is None else result.key,
        "result_deleted_at": None if result is None else result.deleted_at,
        "meta": encode(request.meta),
    }


def request_from(row: Row) -> Request:
    """A request from its row."""
    return Request(
        id=row["id"],
        seq=row["seq"],
        owner=row["owner"],
        deployment=row["deployment"],
        model_key=row["model_key"],
        compress=bool(row["compress"]),
        env=decode(row["env"]),
        blob_bytes=row["blob_bytes"],
        blob_sha256=row["blob_sha256"],
        limits=Limits(**decode(row["limits"])),
        accepted_at=row["accepted_at"],
        expires_at=row["expires_at"],
        keep=bool(row["keep"]),
        client=decode(row["client"]),
        state=RequestState(row["state"]),
        attempt=row["attempt"],
        crashes=row["crashes"],
        holder=row["holder"],
        ended_at=row["ended_at"],
        failure=_failure_from(row["failure"]),
        result=_result_from(row),
        meta=decode(row["meta"]),
    )


def stored_from(row: Row) -> Stored:
    """A request and its newest attempt, from a row of the query `load`."""
    newest = None
    if row["lease_holder"] is not None:
        newest = Attempt(
            request_id=row["id"],
            attempt=row["attempt"],
            holder=row["lease_holder"],
            granted_at=row["granted_at"],
            started_at=row["started_at"],
            ended_at=row["lease_ended_at"],
            end=row["ended_by"],
            evidence=decode(row["evidence"]),
        )
    return Stored(request=request_from(row), newest=newest)


def attempt_params(attempt: Attempt) -> dict[str, Any]:
    """What the statements on attempts bind."""
    return {
        "request_id": attempt.request_id,
        "attempt": attempt.attempt,
        "holder": attempt.holder,
        "granted_at": attempt.granted_at,
        "started_at": attempt.started_at,
        "ended_at": attempt.ended_at,
        "end": attempt.end,
        "evidence": encode(attempt.evidence),
    }


def attempt_from(row: Row) -> Attempt:
    """An attempt from its row."""
    return Attempt(
        request_id=row["request_id"],
        attempt=row["attempt"],
        holder=row["holder"],
        granted_at=row["granted_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        end=row["ended_by"],
        evidence=decode(row["evidence"]),
    )


def _failure_from(text: str | None) -> Failure | None:
    if text is None:
        return None
    body = decode(text)
    return Failure(
        kind=FailureKind(body["kind"]), message=body["message"], details=body["details"]
    )


def _result_from(row: Row) -> ResultRef | None:
    if row["result_bytes"] is None:
        return None
    return ResultRef(
        size_bytes=row["result_bytes"],
        key=row["result_key"],
        deleted_at=row["result_deleted_at"],
    )


# -- values whose fields are the columns ---------------------------------------------------------


def params(value: Deployment | Token | Allocation | Peer | Charge) -> dict[str, Any]:
    """What the insert of a value binds: its fields under their names."""
    return {each.name: getattr(value, each.name) for each in fields(value)}


def _plain(kind: type[_V], row: Row, **other: Any) -> _V:
    values = {each.name: row[each.name] for each in fields(kind) if each.name not in other}
    return kind(**values, **other)


def token_params(token: Token) -> dict[str, Any]:
    """What `insert_token` binds."""
    return params(token) | {"limits": encode(token.limits.numbers())}


def token_from(row: Row) -> Token:
    """A token from its row."""
    return _plain(
        Token,
        row,
        role=Role(row["role"]),
        keep=bool(row["keep"]),
        limits=Allowed(**decode(row["limits"])),
    )


def deployment_params(deployment: Deployment) -> dict[str, Any]:
    """What `insert_deployment` binds."""
    adapters = json.dumps([asdict(each) for each in deployment.adapters])
    more_tasks = json.dumps(deployment.more_tasks)
    limits = encode(deployment.limits.numbers())
    return params(deployment) | {"adapters": adapters, "more_tasks": more_tasks, "limits": limits}


def deployment_from(row: Row) -> Deployment:
    """A deployment from its row."""
    adapters = tuple(Adapter(**each) for each in json.loads(row["adapters"]))
    return _plain(
        Deployment,
        row,
        more_tasks=tuple(json.loads(row["more_tasks"])),
        trust_remote_code=bool(row["trust_remote_code"]),
        limits=Allowed(**decode(row["limits"])),
        adapters=adapters,
    )


def allocation_from(row: Row) -> Allocation:
    """An allocation from its row."""
    return _plain(Allocation, row, state=AllocationState(row["state"]))


def peer_from(row: Row) -> Peer:
    """A peer from its row."""
    return _plain(Peer, row, role=PeerRole(row["role"]))


def charge_from(row: Row) -> Charge:
    """A charge from its row."""
    return _plain(Charge, row)


def event_params(event: AllocationEvent) -> dict[str, Any]:
    """What `insert_event` binds."""
    return {
        "allocation": event.allocation,
        "at": event.at,
        "event": event.event,
        "detail": encode(event.detail),
    }


def event_from(row: Row) -> AllocationEvent:
    """An event from its row."""
    return AllocationEvent(
        allocation=row["allocation"],
        at=row["at"],
        event=row["event"],
        detail=decode(row["detail"]),
    )
