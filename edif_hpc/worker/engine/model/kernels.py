"""Models whose numbers are others when gradients are tracked.

A request that does not speak of gradients runs without them, which saves the memory of a graph. Locally
they are tracked all the same, and that is no difference to most models. To some it is: torch has fused
kernels that it takes only when there is nothing to go back through, and they round otherwise. T5, for
one, adds a learned bias to its attention, and the fused attention takes no mask that wants a gradient.

No list of such models would be complete, so each is tried: one text, forward with and without gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from edif_hpc.worker.engine.model import selftest

#: Long enough for the kernels of many rows.
TEXT = "The quick brown fox jumps over the lazy dog."


def differ_with_gradients(model: Any) -> bool:
    """Whether a forward of `model` has other bits with gradients than without."""
    if not selftest.takes_text(model):
        return False
    tokens = {name: each.to(model.device) for name, each in selftest.tokens(model, TEXT).items()}
    without, tracked = (
        _forward(model, tokens, gradients=False),
        _forward(model, tokens, gradients=True),
    )
    return not all(map(torch.equal, without, tracked))


def _forward(model: Any, tokens: dict[str, Any], *, gradients: bool) -> list[torch.Tensor]:
    with torch.set_grad_enabled(gradients):
        output = model._module(**tokens)  # noqa: SLF001 - as nnsight's own helpers do
    return [each.detach() for each in tree_leaves(output) if isinstance(each, torch.Tensor)]
