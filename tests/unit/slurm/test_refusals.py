from __future__ import annotations

import pytest

from edif_hpc.errors import SubmitRefused, SubmitUnknown
from edif_hpc.slurm.refusals import refusal

FAILED = "sbatch: error: Batch job submission failed: "


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (FAILED + "Unable to contact slurm controller (connect failure)", "retry"),
        (FAILED + "Slurm backup controller in standby mode", "retry"),
        (FAILED + "Slurm temporarily unable to accept job, sleeping and retrying", "retry"),
        (FAILED + "Invalid authentication credential", "retry"),
        ("sbatch: error: AssocMaxSubmitJobLimit\n" + FAILED + "Job violates accounting/QOS policy "
         "(job submit limit, user's size and/or time limits)", "quota"),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit\n" + FAILED + "Job violates accounting/QOS policy", "quota"),
        ("sbatch: error: QOSMaxWallDurationPerJobLimit\n" + FAILED + "Job violates accounting/QOS policy", "config"),
        (FAILED + "Requested time limit is invalid (missing or exceeds some limit)", "config"),
        (FAILED + "Requested node configuration is not available", "config"),
        ("sbatch: error: invalid partition specified: x\n" + FAILED + "Invalid partition name specified", "config"),
        ("sbatch: error: Invalid generic resource (gres) specification", "config"),
        (FAILED + "Invalid account or account/partition combination specified", "config"),
        (FAILED + "Invalid qos specification", "config"),
        ("sbatch: unrecognized option '--foo'\nTry \"sbatch --help\" for more information", "config"),
        ("sbatch: error: You must give an account\n" + FAILED + "Unspecified error", "config"),
        ("allocation failure: Invalid partition name specified", "config"),
    ],
)  # fmt: skip
def test_refusals(said: str, kind: str) -> None:
    error = refusal(said)
    assert isinstance(error, SubmitRefused)
    assert error.kind == kind
    assert said.splitlines()[-1].strip() in str(error), "the operator reads Slurm's own words"


@pytest.mark.parametrize(
    "said",
    [
        FAILED + "Socket timed out on send/recv operation",
        FAILED + "Zero Bytes were transmitted or received",
        FAILED + "Transport endpoint is not connected",
        "",
        "\n",
    ],
)
def test_a_lost_answer_is_no_refusal(said: str) -> None:
    assert isinstance(refusal(said), SubmitUnknown)
