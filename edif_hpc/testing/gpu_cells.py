"""What the client of `check_gpu` runs, cell by cell: each is Python of a researcher's notebook, with an unmodified nnsight.

`LOCAL` comes first and keeps what the blocks give in the client's own process; `compared` runs one of them remotely.
"""

from __future__ import annotations

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


def _block(name: str, where: str) -> str:
    return _BLOCKS[name].format(where=where)


LOCAL: Final = """
import time
import torch
from nnsight import TransformersModel
model = TransformersModel("edif/tiny-gpt2", task="text-generation", dispatch=True)
at_home = {}
""" + "".join(f"{_block(name, '')}at_home[{name!r}] = value.detach().cpu()\n" for name in _BLOCKS)


def compared(name: str) -> str:
    """A block, sent, beside what it gave at home."""
    return f"""{_block(name, ", remote=True")}
mine = at_home[{name!r}]
apart = (value.detach().double() - mine.double()).abs().max().item()
report(
    equal=torch.equal(value.detach(), mine) and value.dtype is mine.dtype,
    close=value.device.type == "cpu" and torch.allclose(value.detach(), mine, rtol=1e-4, atol=1e-5),
    difference=apart, device=str(model.device),
)
"""


EDIT: Final = """
with model.trace("made larger", remote=True):
    model.transformer.wte.weight.data.mul_(2)
    total = model.lm_head.weight.double().sum().item().save()
report(total=total)
"""

MEMORY: Final = """
on_gpu = model.device.type == "cuda"
report(free=torch.cuda.mem_get_info()[0] if on_gpu else 0)
"""


def memory_back(before: int) -> str:
    """Wait until as much is free as before, to 256 MiB."""
    return f"""
began, back = time.monotonic(), not on_gpu
while not back and time.monotonic() - began < 60:
    back = torch.cuda.mem_get_info()[0] >= {before} - (256 << 20)
    time.sleep(0.01)
report(back=back, seconds=time.monotonic() - began)
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

FACTS: Final = """
import nnsight
import transformers
gpu = torch.cuda.is_available()
report(**{
    "device": torch.cuda.get_device_name() if gpu else "stand-in",
    "memory": f"{torch.cuda.mem_get_info()[1] / 1e9:.1f} GB" if gpu else "the host's",
    "torch": torch.__version__,
    "CUDA or HIP": torch.version.cuda or torch.version.hip or "none",
    "nnsight": nnsight.__version__,
    "transformers": transformers.__version__,
})
"""


def timed(rounds: int) -> str:
    """How long whole blocks take, sent and at home."""
    return f"""
def once(**where):
    began = time.perf_counter()
    with model.trace("The Eiffel Tower is in", **where) as tracer:
        value = model.lm_head.output.save()
    return time.perf_counter() - began, tracer
for _ in range(2):
    once(remote=True)
remote, runtime = [], []
for _ in range({rounds}):
    took, tracer = once(remote=True)
    remote.append(took)
    runtime.append(tracer.backend.meta["runtime"])
local = [once()[0] for _ in range({rounds})]
report(remote=remote, runtime=runtime, local=local)
"""
