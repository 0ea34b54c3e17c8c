import pytest

from fedsim.data.datasets import load_dataset
from fedsim.engine.runtime import Runtime
from fedsim.simulation import Simulation
from fedsim.sweep.metrics import final_metrics, reported_metrics
from tests.conftest import small_experiment


@pytest.mark.ray
def test_a_trial_reports_what_was_promised_and_the_strongest_counts(runtime: Runtime) -> None:
    config = small_experiment(
        defense={"name": "gc", "prune": 0.5},
        attacks=[{"name": "dlg", "iterations": 2}, {"name": "gia", "iterations": 2}],
        audit={"victims": 1, "rounds": [0, 1], "adversaries": ["naive", "adaptive"]},
        federation={"rounds": 1},
        overhead_pairs=1,
    )
    result = Simulation(config, runtime=runtime, dataset=load_dataset(config.data)).run()
    found = final_metrics(result)
    assert set(found) == reported_metrics(config)
    naive = [audit.mean("PSNR") for audit in result.audits if audit.adversary == "naive"]
    every = [audit.mean("PSNR") for audit in result.audits]
    assert found["naive.PSNR"] == max(naive)
    assert found["adaptive.PSNR"] == found["PSNR"] == max(every)


def test_nothing_is_promised_of_a_defense_that_is_not_there() -> None:
    bare = small_experiment(overhead_pairs=3)
    assert "ART_overhead" not in reported_metrics(bare)
    assert not any("PSNR" in name for name in reported_metrics(bare))
    assert "ART_overhead" in reported_metrics(small_experiment(overhead_pairs=3, defense={"name": "gc"}))


def test_an_attack_with_strategies_of_its_own_promises_those() -> None:
    audit = {"victims": 1, "rounds": [0], "adversaries": ["adaptive"]}
    learned = small_experiment(defense={"name": "gc"}, attacks=[{"name": "inverter"}], audit=audit)
    audits = {name for name in reported_metrics(learned) if name.endswith(".PSNR") and name != "adaptive.PSNR"}
    assert len(audits) == 1 and "simulated" in audits.pop()
