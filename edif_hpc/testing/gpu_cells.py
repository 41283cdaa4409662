"""What the client of `check_gpu` runs, cell by cell: each is Python of a researcher's notebook, with an unmodified nnsight.

`at_home` runs in a process of its own and keeps what the blocks give there; `compared` runs one of them remotely.
"""

from __future__ import annotations

import textwrap
from typing import Final

#: Each block gives `value`; `{where}` is what makes it remote.
_BLOCKS: Final = {
    "trace": """
with model.trace("The Eiffel Tower is in"{where}):
    value = model.lm_head.output.save()
""",
    "generation": """
with model.generate("def main(", max_new_tokens=8, do_sample=False{where}) as tracer:
    value = tracer.result.save()
""",
    "gradient": """
with model.trace("gradients flow"{where}):
    hidden = model.transformer.h[0].output
    loss = model.lm_head.output.sum()
    with loss.backward():
        value = hidden.grad.save()
""",
}


#: The file of what was computed at home.
KEPT: Final = "at-home.pt"


def _block(name: str, where: str) -> str:
    return _BLOCKS[name].format(where=where)


def at_home(file: str, rounds: int) -> str:
    """Compute all blocks in a process of its own, which ends before the worker begins: a GPU may take one process only."""
    blocks = "".join(
        f"{_block(name, '')}at_home[{name!r}] = value.detach().cpu()\n" for name in _BLOCKS
    )
    return f"""
import time
import nnsight
import torch
import transformers
from nnsight import TransformersModel
model = TransformersModel("edif/tiny-gpt2", task="text-generation", dispatch=True)
at_home = {{}}
{blocks}
torch.save(at_home, {file!r})
local = []
for _ in range({rounds}):
    began = time.perf_counter()
{_indented(_block("trace", ""))}
    local.append(time.perf_counter() - began)
gpu = model.device.type == "cuda"
facts = {{
    "device": torch.cuda.get_device_name() if gpu else "stand-in",
    "devices": torch.cuda.device_count(),
    "memory": f"{{torch.cuda.mem_get_info()[1] / 1e9:.1f}} GB" if gpu else "the host's",
    "torch": torch.__version__,
    "CUDA or HIP": torch.version.cuda or torch.version.hip or "none",
    "nnsight": nnsight.__version__,
    "transformers": transformers.__version__,
}}
report(local=local, computed_on=str(model.device), facts=facts)
"""


def begin(file: str) -> str:
    """What the client has: a model without weights, and what was computed at home."""
    return f"""
import time
import torch
from nnsight import TransformersModel
model = TransformersModel("edif/tiny-gpt2", task="text-generation")
at_home = torch.load({file!r})
"""


def compared(name: str) -> str:
    """A block, sent, beside what it gave at home."""
    return f"""{_block(name, ", remote=True")}
mine = at_home[{name!r}]
apart = (value.detach().double() - mine.double()).abs().max().item()
report(
    equal=torch.equal(value.detach(), mine) and value.dtype is mine.dtype,
    close=value.device.type == "cpu" and torch.allclose(value.detach(), mine, rtol=1e-4, atol=1e-5),
    difference=apart,
)
"""


EDIT: Final = """
with model.trace("made larger", remote=True):
    model.transformer.wte.weight.data.mul_(2)
    total = model.lm_head.weight.double().sum().item().save()
report(total=total)
"""

#: Two rows of numbers change places, which no sum would tell.
SWAP: Final = """
with model.session(remote=True) as session:
    rows = model._module.transformer.h[0].mlp.c_fc.weight.data
    rows[[0, 1]] = rows[[1, 0]]
    swapped = [1].save()
meta = session.backend.meta
report(meta={name: meta.get(name) for name in ("restored_tensors", "restore_s")})
"""

SETTLED: Final = """
with model.session(remote=True) as session:
    nothing = [1].save()
report(restore_s=session.backend.meta["restore_s"])
"""

FREE: Final = """
with model.session(remote=True):
    import torch
    device = next(model._module.parameters()).device
    free = [torch.cuda.mem_get_info(each)[0] for each in range(torch.cuda.device_count())] if device.type == "cuda" else [0]
    free = free.save()
report(free=free)
"""


def endless(*, gpu: bool) -> str:
    """A request whose kernel runs for hours; on the CPU, a loop."""
    spinning = (
        "torch.cuda._sleep(1 << 50); torch.cuda.synchronize()" if gpu else "while True: pass"
    )
    return f"""
with model.session(remote=True):
    import torch
    {spinning}
"""


GREEDY: Final = """
with model.session(remote=True):
    import torch
    device = next(model._module.parameters()).device
    taken = []
    for _ in range(4096):
        taken.append(torch.empty(1 << 30, dtype=torch.uint8, device=device))
"""

GREEDY_AT_HOME: Final = """
with model.session(remote=True):
    import torch
    taken = []
    for _ in range(4096):
        taken.append(torch.empty(1 << 30, dtype=torch.uint8, device="cpu"))
"""

NODES: Final = """
with model.session(remote=True):
    import os
    opened = set()
    for each in os.listdir("/proc/self/fd"):
        try:
            opened.add(os.readlink(f"/proc/self/fd/{each}"))
        except OSError:
            pass
    opened = sorted(each for each in opened if each.startswith("/dev/") and each != "/dev/null")
    opened = opened.save()
report(opened=opened)
"""

CACHES: Final = """
with model.session(remote=True):
    import os
    import torch
    device = next(model._module.parameters()).device
    try:
        # On CUDA its kernel is compiled when it is first asked for.
        compiled = str(torch.special.bessel_j0(torch.ones(4, device=device))[0].item())
    except RuntimeError as error:
        compiled = f"failed: {error}"[:200]
    own = os.path.realpath(os.environ["HOME"]) == os.getcwd()
    left = sorted(os.listdir("."))
    try:
        open("../home/left", "w").close()
        others = True
    except OSError:
        others = False
    told = {"compiled": compiled, "own": own, "left": left, "others": others}
    told = told.save()
report(**told)
"""

#: A piece of a GPU's memory that is more than a limit of 64 MiB and less than any GPU.
OVER_THE_LIMIT: Final = """
with model.session(remote=True):
    import torch
    device = next(model._module.parameters()).device
    taken = torch.ones(256 << 20, dtype=torch.uint8, device=device).sum().item()
"""


def timed(rounds: int) -> str:
    """How long whole blocks take."""
    return f"""
def once():
    began = time.perf_counter()
    with model.trace("The Eiffel Tower is in", remote=True) as tracer:
        value = model.lm_head.output.save()
    return time.perf_counter() - began, tracer
for _ in range(2):
    once()
remote, runtime = [], []
for _ in range({rounds}):
    took, tracer = once()
    remote.append(took)
    runtime.append(tracer.backend.meta["runtime"])
report(remote=remote, runtime=runtime)
"""


def _indented(block: str) -> str:
    return textwrap.indent(block, "    ")
