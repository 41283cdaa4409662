"""What an operator names: a deployment, a model, a slot or an allocation, as the relay knows them."""

from __future__ import annotations

from typing import Any

import click

from edif_hpc.cli.api import Api
from edif_hpc.cli.model import deployment_of, looks_like_a_model, looks_like_a_path
from edif_hpc.errors import NotFound

Line = dict[str, Any]


def processes(api: Api, deployment: str | None = None) -> list[Line]:
    """The lines of `ps`: of one deployment, or all."""
    found: list[Line] = api.get("/api/ps")["processes"]
    return [line for line in found if deployment in {None, line["deployment"]}]


def slot_of(line: Line) -> str:
    """The slot that a line fills."""
    return f"{line['deployment']}/{line['slot']}"


def deployed(api: Api, target: str) -> Line | None:
    """The deployment that is meant by its name or its model; None if there is none yet."""
    known = api.get("/api/deployments")["deployments"]
    if looks_like_a_model(target):
        wanted = deployment_of(target, {})["repo_id"].lower()
        return next((each for each in known if each["repo_id"].lower() == wanted), None)
    return next((each for each in known if each["name"] == target), None)


def must_be_deployed(api: Api, target: str) -> Line:
    """The same, where there has to be one.

    Raises:
        NotFound: there is none; it names those there are.
    """
    found = deployed(api, target)
    if found is None:
        known = [each["name"] for each in api.get("/api/deployments")["deployments"]]
        raise NotFound(
            f"there is no deployment {target!r}; deployed: {', '.join(known) or 'nothing yet'}"
        )
    return found


def add_if_new(api: Api, target: str, *, device: str | None, usual: str) -> str:
    """The name of the deployment that is meant; a model that is not deployed is added, on the `usual` device if none is given.

    Raises:
        click.UsageError: it is deployed on another device than the one that is given.
    """
    if device is None and not looks_like_a_model(target):
        return target
    found = deployed(api, target)
    if found is not None and device is not None and device != found["device"]:
        raise click.UsageError(
            f"{found['name']} is computed on {found['device']}, and stays there; to change it, remove it and add it again: "
            f"edif-hpc deployment rm {found['name']}"
        )
    if found is not None or not looks_like_a_model(target):
        return target if found is None else str(found["name"])
    wanted = deployment_of(target, {"device": device or usual})
    name = str(api.post("/api/deployments", wanted)["name"])
    click.echo(
        f"added the deployment {name} of {wanted['repo_id']}, computed on {wanted['device']}"
    )
    if looks_like_a_path(target):
        click.echo(
            "  (to serve it under a Hub name: edif-hpc deployment add ORG/NAME --source PATH)"
        )
    return name
