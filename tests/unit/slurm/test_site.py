from __future__ import annotations

from pathlib import Path

import pytest

from edif_hpc.errors import SettingsError
from edif_hpc.slurm.order import Route
from edif_hpc.slurm.site import load_site

PROFILES = Path(__file__).parents[3] / "slurm"
TOP = 'name = "here"\nscheduler = "slurm"\nstate_dir = "/shared/edif"\n'
GPU = """
[gpus.a6000]
partition = "gpu"
gres = "gpu:a6000"
vendor = "nvidia"
max_walltime_min = 60
cpus = 4
mem_gb = 32
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "here.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_profile_can_be_used(path: Path) -> None:
    site = load_site(path)
    assert site.name == path.stem
    assert site.state_dir.is_absolute()


def test_what_is_not_said_has_a_default(tmp_path: Path) -> None:
    site = load_site(write(tmp_path, TOP + GPU))
    assert site.container is None
    assert site.limits.max_pending == 4
    assert site.gpus["a6000"].account is None


def test_the_engine_has_a_table(tmp_path: Path) -> None:
    text = TOP + '[engine]\nhub_cache = "/shared/models"\n' + GPU
    assert load_site(write(tmp_path, text)).engine.hub_cache == "/shared/models"
    with pytest.raises(SettingsError, match="engine: no such key: cache; valid are: hub_endpoint"):
        load_site(write(tmp_path, text.replace("hub_cache", "cache")))


def test_what_requests_may_read_is_checked(tmp_path: Path) -> None:
    def read(line: str) -> tuple[str, ...]:
        return load_site(write(tmp_path, f"{TOP}[engine]\n{line}\n{GPU}")).engine.readable

    assert read('stores = ["/data"]\nlibraries = ["/py"]') == ("/data", "/py")
    for line, words in {
        'stores = ["data"]': "must be an absolute path",
        'stores = ["/data/../shared"]': "must be an absolute path",
        'stores = ["/shared"]': "/shared/edif is in it",
        'libraries = ["/"]': "every request may read then",
    }.items():
        with pytest.raises(SettingsError, match=words):
            read(line)


def test_a_route_is_told_to_pilots(tmp_path: Path) -> None:
    def way_out(text: str) -> Route:
        return load_site(write(tmp_path, TOP + text + GPU)).way_out

    assert way_out("") == Route()
    socks = way_out('route = "socks"\nproxy = "proxy.here:1080"\n')
    assert socks == Route(kind="socks", proxy="proxy.here:1080")
    file = "/shared/edif/forward.json"
    assert way_out('route = "login"\n') == Route(kind="login", forward_file=file)
    other = way_out('route = "login"\nproxy = "[fd00::1]:3128"\n')
    assert other == Route(kind="login", proxy="[fd00::1]:3128", forward_file=file)


def test_a_home_is_expanded(tmp_path: Path) -> None:
    site = load_site(write(tmp_path, TOP.replace("/shared", "~") + GPU))
    assert site.state_dir == Path("~/edif").expanduser()


@pytest.mark.parametrize(
    ("text", "key", "what"),
    [
        (TOP, "gpus", "at least one table"),
        ("colour = 1\n" + TOP + GPU, "", "no such key: colour; valid are: name, scheduler"),
        (TOP + GPU + "cpu = 1\n", "gpus.a6000", "no such key: cpu; valid are: partition"),
        (TOP + GPU.replace("= 4", '= "4"'), "gpus.a6000.cpus", "Expected `int`"),
        (TOP + GPU.replace("= 4", "= 0"), "gpus.a6000.cpus", "1 or more"),
        (TOP + GPU.replace("nvidia", "intel"), "gpus.a6000.vendor", "use one of: nvidia, amd"),
        (TOP + GPU.replace("gpu:a6000", "gpu:a6000:2"), "gpus.a6000.gres", "without a number"),
        (TOP + GPU.replace('"gpu"', '"gpu fast"'), "gpus.a6000.partition", "one word"),
        (TOP + GPU.replace("[gpus.a6000]", "[gpus.A6000]"), "gpus.A6000", "small letters"),
        (TOP + GPU + '[gpus.a6000.options]\ntime = "9"', "gpus.a6000.options.time", "itself"),
        (TOP + GPU + '[gpus.a6000.options]\n-x = "9"', "gpus.a6000.options.-x", "long option"),
        (TOP + 'gpus = "a6000"\n', "gpus", "must be a table"),
        (TOP.replace("slurm", "pbs") + GPU, "scheduler", "use one of: local, slurm"),
        (TOP.replace("/shared", "shared") + GPU, "state_dir", "absolute"),
        (TOP.replace("/shared", "/my lab") + GPU, "state_dir", "without spaces"),
        (TOP.replace("/shared", "/shared/%j") + GPU, "state_dir", "without spaces"),
        (TOP + 'route = "ssh"\n' + GPU, "route", "use one of: direct, socks, connect, login"),
        (TOP + 'route = "socks"\n' + GPU, "proxy", "needs it, as HOST:PORT"),
        (TOP + 'route = "connect"\nproxy = "http://a:1"\n' + GPU, "proxy", "must be HOST:PORT"),
        (TOP + 'proxy = "a:1"\n' + GPU, "proxy", "but the route is 'direct'"),
        (TOP + 'setup = ["a\\nb"]\n' + GPU, "setup", "one line"),
        (TOP + "kill_wait_s = 0\n" + GPU, "kill_wait_s", "1 or more"),
        (TOP + GPU + "[limits]\nmax_pending = 0\n", "limits.max_pending", "1 or more"),
        (TOP + GPU + '[container]\nimage = "i"\nsha256 = "12"\n', "container.sha256", "64 hex"),
        (TOP + GPU + "[container]\n", "container", "missing required field `image`"),
        (TOP + "=", "", "not TOML"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_key(
    tmp_path: Path, text: str, key: str, what: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as error:
        load_site(path)
    assert str(path) in str(error.value)
    assert key in str(error.value)
    assert what in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere.toml cannot be read: No such file"):
        load_site(tmp_path / "nowhere.toml")


def test_a_file_with_a_secret_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    path.write_text(TOP + GPU + '[engine]\nhub_token = "hf_x"\n')
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        load_site(path)
    path.chmod(0o600)
    assert load_site(path).engine.hub_token == "hf_x"
