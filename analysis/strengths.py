"""How strong each defense must be: the weakest setting at which the naive attack falls to the floor.

The rule is the same for all defenses. On each data set and table, a ladder of strengths is tried on the untrained
model, and the weakest is taken at which the mean PSNR of the naive attack is no better than the best guess
that knows nothing. The preset's strength in a table is the largest over the data sets, so that it holds on all.
The victims are drawn from a seed that no preset uses. A ladder is searched by halving, since a stronger setting
of one defense never helps the attack by more than chance.

    .venv/bin/python -m analysis.strengths --dataset digits mnist fashion_mnist cifar10
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedsim.comparison_config import ComparisonConfig, load_comparison_config, narrow
from fedsim.config import ExperimentConfig, parse_config
from fedsim.data.datasets import Dataset, load_dataset
from fedsim.engine.runtime import Runtime
from fedsim.settings import merged
from fedsim.simulation import Simulation

SEED = 1000
HALF_DECADES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
FRACTIONS = (0.01, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
LADDERS: dict[str, tuple[str, Sequence[float]]] = {
    "graddefense": ("sigma", HALF_DECADES),
    "gc": ("prune", FRACTIONS),
    "dp_gaussian": ("sigma", HALF_DECADES),
    "dp_laplacian": ("sigma", HALF_DECADES),
    "pld": ("prune", FRACTIONS),
}


def tried(config: ExperimentConfig, dataset: Dataset, runtime: Runtime) -> dict[str, Any]:
    """Attack the untrained model once; return mean PSNR and SSIM, the floor, and how many attacks were unsound."""
    result = Simulation(config, runtime=runtime, dataset=dataset).run()
    audit, floors = result.audits[0], result.summary["floors"]
    return {
        "PSNR": audit.mean("PSNR"),
        "SSIM": audit.mean("SSIM"),
        "floor": max(floor["PSNR"] for floor in floors.values()),
        "images": len(audit.rows),
        "unsound": sum(row.stalled or row.exhausted for row in audit.rows),
    }


def search(cell: ExperimentConfig, defense: str, dataset: Dataset, runtime: Runtime) -> list[dict[str, Any]]:
    """Halve the ladder of one defense until the weakest strength that reaches the floor is known."""
    parameter, ladder = LADDERS[defense]
    rows: list[dict[str, Any]] = []
    low, high = 0, len(ladder)
    while low < high:
        middle = (low + high) // 2
        settings = {
            "defense": {parameter: ladder[middle]},
            "federation": {"rounds": 1},
            "overhead_pairs": 0,
            "seed": SEED,
        }
        config = parse_config(merged(cell.to_dict(), settings))
        config = config.model_copy(update={"attacks": config.attacks[:1]})
        row = tried(config, dataset, runtime)
        rows.append({"parameter": parameter, "strength": ladder[middle], **row})
        low, high = (low, middle) if row["PSNR"] <= row["floor"] else (middle + 1, high)
    for row in rows:
        row["chosen"] = low < len(ladder) and row["strength"] == ladder[low]
    return rows


def calibrate(config: ComparisonConfig, data_dir: Path | None, output: Path) -> pd.DataFrame:
    """Try strengths on every cell of a comparison but those without a defense.

    Every strength that was tried is a row of the result and, as soon as its cell is done, of the CSV `output`.
    """
    rows: list[dict[str, Any]] = []
    datasets: dict[str, Dataset] = {}
    with Runtime(config.runtime) as runtime:
        for cell in config.cells():
            if cell.defense not in LADDERS or cell.seed != config.seeds[0]:
                continue
            if cell.dataset not in datasets:
                datasets[cell.dataset] = load_dataset(cell.config.data, data_dir)
            place = {"table": cell.table, "dataset": cell.dataset, "defense": cell.defense}
            found = search(cell.config, cell.defense, datasets[cell.dataset], runtime)
            rows += [{**place, **row} for row in found]
            pd.DataFrame(rows).round(6).to_csv(output, index=False)
            chosen = [row["strength"] for row in found if row["chosen"]]
            print(
                *place.values(), f"{found[0]['parameter']} =", chosen[0] if chosen else "not reached", flush=True
            )
    return pd.DataFrame(rows)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Find the strength of each defense at which the attack fails.")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--dataset", nargs="+")
    parser.add_argument("--attack", nargs="+")
    parser.add_argument("--defense", nargs="+")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path("analysis/results/strengths.csv"))
    options = parser.parse_args()
    config = narrow(load_comparison_config(options.preset), options.dataset, options.defense, options.attack)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    frame = calibrate(config, options.data_dir, options.output)
    best = frame[frame["chosen"]].groupby(["table", "defense"])["strength"].max()
    print(best.to_string())


if __name__ == "__main__":
    main()
