"""What the engine's programs find in their environment, and where what they leave behind goes."""

from __future__ import annotations

from pathlib import Path

from edif_hpc.worker.engine.environment import home, of_driver, of_program, places
from edif_hpc.worker.engine.values import EngineSpec

CACHES = {
    "HOME", "TMPDIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH",
    "MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR",
}  # fmt: skip


def test_every_place_is_below_the_folder() -> None:
    found = places(Path("/scratch/executor-1"))
    assert set(found) == CACHES
    assert all(Path(each).is_relative_to("/scratch/executor-1") for each in found.values())


def test_executors_and_the_zygote_share_none(tmp_path: Path) -> None:
    zygote = set(places(home(tmp_path)).values())
    first, second = (set(places(tmp_path / f"executor-{each}").values()) for each in (1, 2))
    assert zygote.isdisjoint(first | second)
    assert first.isdisjoint(second)


def test_a_driver_is_found_where_the_worker_finds_it(tmp_path: Path) -> None:
    plain = EngineSpec(model_key="key", source="source", scratch=tmp_path)
    linker, choice = {"LD_LIBRARY_PATH": "/.singularity.d/libs"}, {"ROCR_VISIBLE_DEVICES": "2"}
    spec = EngineSpec(
        model_key="key", source="source", scratch=tmp_path, device="cuda", driver=linker | choice
    )
    assert of_program(spec) == of_program(plain) | linker
    assert of_driver(spec) == choice
    assert of_driver(plain) == {}


def test_no_program_sees_a_device_before_it_is_shown_one(tmp_path: Path) -> None:
    driver = {"CUDA_VISIBLE_DEVICES": "3"}
    spec = EngineSpec(
        model_key="key", source="source", scratch=tmp_path, device="cuda", driver=driver
    )
    assert of_program(spec)["CUDA_VISIBLE_DEVICES"] == ""
    assert of_driver(spec) == driver
