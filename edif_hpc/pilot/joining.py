"""Joining: how a pilot makes itself known to the relay, once, over HTTPS.

It names the join token of its order and the public keys that it made on the node; the answer says where the relay's ZeroMQ
socket is, and by which key to know it. A relay that is away for a minute is waited for. One that refuses is not asked again.
"""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Any, Final

import httpx
from socksio import SOCKSError

from edif_hpc.errors import LaunchError, NotAuthenticated
from edif_hpc.pilot.route import Way
from edif_hpc.slurm.order import PilotOrder

_log = logging.getLogger(__name__)

_TIMEOUT: Final = httpx.Timeout(30.0, connect=10.0)
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 15.0


async def join(
    order: PilotOrder, way: Way, *, worker_key: str, pilot_key: str, node: str
) -> dict[str, Any]:
    """Join; returns the relay's answer, with the endpoint to dial from this node.

    Raises:
        LaunchError: it cannot be reached, or refuses.
        NotAuthenticated: the token is not good any more; it was spent, or another job is to fill this place.
    """
    body = {
        "join_token": order.join_token,
        "worker_key": worker_key,
        "pilot_key": pilot_key,
        "node": node,
    }
    joined = await _ask(order, way, body)
    return joined | {"endpoint": await way.endpoint(joined["endpoint"])}


async def _ask(order: PilotOrder, way: Way, body: dict[str, str]) -> dict[str, Any]:
    loop, pause_s = asyncio.get_running_loop(), _FIRST_PAUSE_S
    patience = loop.time() + order.join_s
    async with httpx.AsyncClient(timeout=_TIMEOUT, proxy=way.proxy) as http:
        while True:
            try:
                response = await http.post(f"{order.relay_url}/api/join", json=body)
            except (httpx.HTTPError, SOCKSError) as error:  # the latter if the tunnel hangs up
                why = _no_way(order, way, error, body["node"])
            else:
                answer = _answer(response)
                if answer is not None:
                    return answer
                why = (
                    f"the relay at {order.relay_url} did not let this allocation join: HTTP {response.status_code} "
                    f"{response.text[:300]}"
                )
                if response.status_code == HTTPStatus.UNAUTHORIZED:
                    raise NotAuthenticated(why)
                if response.is_client_error:
                    raise LaunchError(why)
            _log.warning("%s", why, extra={"event": "not_joined"})
            if loop.time() + pause_s > patience:
                raise LaunchError(why)
            await asyncio.sleep(pause_s)  # it may be away
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)


def _answer(response: httpx.Response) -> dict[str, Any] | None:
    """What a relay says to a pilot that it lets in; a success may also be some other server's."""
    try:
        said = response.json() if response.is_success else None
    except ValueError:
        return None
    return said if isinstance(said, dict) and "endpoint" in said else None


def _no_way(order: PilotOrder, way: Way, error: Exception, node: str) -> str:
    seen = way.trouble or str(error) or type(error).__name__
    return (
        f"the relay at {order.relay_url} cannot be reached from {node}: {seen}; the site's route is {order.route.kind!r}, "
        "see docs/howto/routes.md"
    )
