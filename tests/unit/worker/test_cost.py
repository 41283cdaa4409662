"""What a job used: measured where it can be, over all its runs."""

from __future__ import annotations

from edif_hpc.domain.limits import Limits
from edif_hpc.domain.request import FailureKind
from edif_hpc.worker.engine.cost import Cost, measured
from edif_hpc.worker.engine.messages import Exited
from edif_hpc.worker.engine.request.console import Meter
from edif_hpc.worker.engine.values import Failed, Plain, Saved


def saved(**meta: Plain) -> Saved:
    return Saved(inline=b"12345", file=None, size=5, meta=meta)


def failed(**meta: Plain) -> Failed:
    return Failed(kind=FailureKind.CRASH, message="", meta=meta)


def test_a_process_that_is_reaped_is_charged_for_the_run_alone() -> None:
    meter = Meter(Limits())
    meter.over("printed")
    exited = Exited(executor=1, status=9, cpu_s=3.5, peak_rss_bytes=1000)
    outcome = failed(cpu_s=0.1, peak_rss_bytes=1)
    cost = measured(outcome, runtime_s=4.0, meter=meter, began_cpu_s=1.5, exited=exited)
    assert cost.told(outcome) == {
        "runtime_s": 4.0, "log_lines": 1, "log_bytes": 7, "result_bytes": 0, "cpu_s": 2.0, "peak_rss_bytes": 1000,
    }  # fmt: skip


def test_an_executors_own_word_counts_where_there_is_no_other() -> None:
    outcome = saved(cpu_s=0.25, peak_rss_bytes=77)
    cost = measured(outcome, runtime_s=1.0, meter=None, began_cpu_s=9.0, exited=None)
    assert cost.told(outcome)["cpu_s"] == 0.25
    assert cost.told(outcome)["peak_rss_bytes"] == 77
    assert cost.told(outcome)["result_bytes"] == 5


def test_what_is_no_number_is_no_cost() -> None:
    cost = measured(
        saved(cpu_s="free", peak_rss_bytes=[1]), runtime_s=1.0, meter=None, began_cpu_s=0.0, exited=None
    )  # fmt: skip
    assert "cpu_s" not in cost.told(saved())
    assert "peak_rss_bytes" not in cost.told(saved())


def test_two_runs_are_added_up() -> None:
    one = Cost(runtime_s=1.0, cpu_s=0.5, peak_rss_bytes=10, log_lines=2, log_bytes=20)
    two = Cost(runtime_s=2.0, cpu_s=None, peak_rss_bytes=30, log_lines=1, log_bytes=5)
    assert one + two == Cost(
        runtime_s=3.0, cpu_s=0.5, peak_rss_bytes=30, log_lines=3, log_bytes=25
    )
    assert Cost() + Cost() == Cost()
