"""The demo's comparison: equal means equal bits, and one that differs is counted."""

from __future__ import annotations

import pytest
import torch

from edif_hpc.testing.demo_client import compare, run_all

VALUES = {"logits": torch.tensor([1.0, 2.0, 3.0])}


def experiment(model: torch.Tensor, *, remote: bool) -> dict[str, torch.Tensor]:
    """Give back the model."""
    return {"logits": model}


def test_equal() -> None:
    [(line, equal)] = compare(VALUES, {"logits": torch.tensor([1.0, 2.0, 3.0])})
    assert equal
    assert "equal, bit for bit" in line


@pytest.mark.parametrize(
    "other",
    [
        torch.nextafter(VALUES["logits"], torch.tensor(9.0)),
        VALUES["logits"].double(),
        VALUES["logits"][None],
    ],
)
def test_a_difference_of_one_bit_of_kind_or_of_shape(other: torch.Tensor) -> None:
    [(line, equal)] = compare(VALUES, {"logits": other})
    assert not equal
    assert "DIFFERS" in line


def test_what_differs_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    there, here = torch.ones(2), torch.zeros(2)
    assert run_all(there, there, [("one", experiment)]) == 0
    assert run_all(there, here, [("one", experiment), ("two", experiment)]) == 2
    assert "2 value(s) DIFFER" in capsys.readouterr().out
