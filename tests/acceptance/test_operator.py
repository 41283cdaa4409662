"""An operator's way on a real Slurm, by the command line alone, as an ordinary user: from `site init` to `down`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.cli.exits import Exit
from edif_hpc.slurm.site import load_site
from edif_hpc.testing.slurm import MAX_MIN, SlurmCluster
from edif_hpc.testing.slurm_stack import SlurmStack
from edif_hpc.testing.stack import child_environ
from edif_hpc.testing.wait import wait_until

pytestmark = pytest.mark.slow

MODEL, NAME = "edif/tiny-gpt2", "tiny-gpt2"
START_S = 90.0


@dataclass
class Login:
    """A login node: the command line, with a settings folder of the user's own."""

    stack: SlurmStack
    home: Path

    def edif(self, *arguments: str, code: Exit = Exit.OK) -> subprocess.CompletedProcess[str]:
        """Run a command; it has to end with this code."""
        cluster, stack = self.stack.cluster, self.stack.stack
        environ = child_environ() | cluster.environ
        environ |= {"EDIF_RELAY": stack.url, "EDIF_TOKEN": stack.operator.token}
        environ |= {"EDIF_CONFIG": str(self.home / "config.toml"), "HOME": str(self.home)}
        done = subprocess.run(
            [*cluster.run.prefix, sys.executable, "-m", "edif_hpc.cli.main", *arguments],
            env=environ, cwd="/", capture_output=True, text=True, timeout=2 * START_S, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{arguments}: {done.stdout}{done.stderr}{self.stack.log}"
        return done

    def told(self, *arguments: str, code: Exit = Exit.OK) -> Any:
        """What a command prints as JSON."""
        return json.loads(self.edif(*arguments, "--json", code=code).stdout)

    @property
    def site_file(self) -> Path:
        return self.home / "sites" / "hpc.toml"

    def wait_for(self, *slots: tuple[int, int, str]) -> list[dict[str, Any]]:
        """The lines of `ps`, once they are these, by slot, generation and state."""

        def so() -> list[dict[str, Any]] | None:
            lines = self.told("ps")
            seen = {(each["slot"], each["generation"], each["state"]) for each in lines}
            return lines if seen == set(slots) else None

        found = wait_until(so, START_S, f"ps shows {slots}")
        assert found is not None
        return found


@pytest.fixture(scope="module")
def login(slurm_cluster: SlurmCluster, tiny_gpt2: Path) -> Iterator[Login]:
    """A relay with a model's files, a real Slurm, no site file, and no launcher."""
    folder = slurm_cluster.root.parent / "operator"
    home = slurm_cluster.folder("operator")
    config = home / "config.toml"
    config.touch(mode=0o600)
    os.chown(config, *slurm_cluster.ids)
    with SlurmStack(root=folder, cluster=slurm_cluster, models={MODEL: tiny_gpt2}) as stack:
        yield Login(stack=stack, home=home)


@pytest.fixture(scope="module")
def site(login: Login) -> Path:
    """The file that `site init` writes, with the test's hub."""
    login.edif("site", "init", "hpc", "--yes", "--scratch", str(login.home / "scratch"))
    text = login.site_file.read_text()
    hub = f'[engine]\nhub_endpoint = "{login.stack.stack.hub}"'
    login.site_file.write_text(text.replace("# [engine]", hub))
    return login.site_file


def test_a_cluster_describes_itself(login: Login, site: Path) -> None:
    facts = load_site(site)
    assert {name: (gpu.partition, gpu.gres, gpu.vendor) for name, gpu in facts.gpus.items()} == {
        "a6000": ("a6000", "gpu:a6000", "nvidia"),
        "mi300x": ("mi300x", "gpu:mi300x", "amd"),
    }
    assert {gpu.max_walltime_min for gpu in facts.gpus.values()} == {MAX_MIN}
    told = login.told("site", "check", "hpc")["findings"]
    assert {each["grade"] for each in told} <= {"OK", "WARN"}
    assert "to start at" in {each["what"]: each["seen"] for each in told}["a6000: sbatch --test-only"]  # fmt: skip


def test_a_probe_tells_what_a_node_can_do(login: Login, site: Path) -> None:
    # These nodes have no GPU's driver, and a probe that said otherwise would be of no use.
    told = login.told("site", "check", "hpc", "--probe", "--timeout", "90s", code=Exit.FAILED)
    for gpu in ("a6000", "mi300x"):
        found = {each["what"]: each for each in told["findings"] if each["gpu"] == gpu}
        assert [what for what, each in found.items() if each["grade"] == "FAIL"] == ["GPU"]
        assert f"reaches {login.stack.stack.url}" in found
        assert [each["seen"] for what, each in found.items() if "reaches tcp://" in what] == [
            "yes"
        ]
        assert "to start at" in found["sbatch from here"]["seen"]
        assert "a worker here reaches" in found["isolation"]["seen"]
        assert "told by" in found["end of the walltime"]["seen"]
    assert "\ncompute_may_submit = true\n" in site.read_text()
    wait_until(lambda: login.stack.jobs() == {}, 30.0, "the probes' jobs have ended")
    assert list(load_site(site).state_dir.iterdir()) == [], "probes leave nothing behind"


def test_from_up_to_down(login: Login, site: Path) -> None:
    arguments = (
        "--site",
        "hpc",
        "--gpu",
        "a6000",
        "--device",
        "cpu",
        "--wait",
        "--timeout",
        "80s",
    )
    up = login.edif("up", MODEL, *arguments)
    assert "no launcher of hpc was heard of" in up.stdout
    assert "as job " in up.stdout
    assert "tiny-gpt2/0: loading" in up.stderr
    assert "keep a launcher running" in up.stdout

    login.stack.start_launcher(noop=False, site=load_site(site))
    [first] = login.wait_for((0, 1, "warm"))
    assert first["left_s"] <= 60 * MAX_MIN
    assert Path(first["log"]).is_file()
    assert f"{NAME}/0: serves" in login.edif("explain", NAME).stdout

    assert login.told("drain", first["name"]) == [first["name"]]
    login.wait_for((0, 2, "warm"))
    [slot] = login.told("explain", NAME)
    assert [each["cause"] for each in slot["generations"]] == ["drained", None]
    assert "the worker ended" in login.edif("logs", first["name"]).stdout

    login.edif("scale", NAME, "2")
    # Its second replica may begin later, or at once with a shorter walltime: `down` ends it in either case.
    wait_until(lambda: len(login.stack.jobs()) == 2, START_S, "Slurm has a job for each replica")
    login.edif("down", NAME, "--wait", "--timeout", "60s")
    assert login.told("ps") == []
    wait_until(lambda: login.stack.jobs() == {}, 30.0, "Slurm has none of our jobs")
