"""Comparisons in MLflow, written as the tracker writes them, with figures that the tests can foresee."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

FLOORS = {
    "noise": {"PSNR": 5.6, "SSIM": 0.01},
    "uniform": {"PSNR": 5.1, "SSIM": 0.02},
    "mean": {"PSNR": 12.0, "SSIM": 0.2},
    "grey": {"PSNR": 6.5, "SSIM": 0.1},
}


@dataclass
class Cell:
    """One finished cell; `psnr` and `ssim` hold one value an image."""

    table: str
    dataset: str
    defense: str
    psnr: list[float]
    seed: int = 0
    ssim: list[float] | None = None
    acc: float = 0.9
    overhead: tuple[float, float, float] | None = None
    muted: list[float] | None = None
    stalled: int = 0
    exhausted: int = 0
    images: np.ndarray | None = None
    test_images: int | None = 10_000
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def attack(self) -> str:
        return {"dga": "dlg", "gia": "gia"}[self.table]


class Store:
    """Writes comparisons to one SQLite store."""

    def __init__(self, folder: Path) -> None:
        from mlflow import MlflowClient

        self.folder = folder
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(self.uri)
        self.experiment = self.client.create_experiment("fedsim", (folder / "artifacts").as_uri())

    def comparison(self, name: str, cells: list[Cell], planned: dict[str, Any] | None = None) -> str:
        tags = {"fedsim.kind": "comparison", "fedsim.name": name}
        run_id = self.client.create_run(self.experiment, tags=tags, run_name=name).info.run_id
        config = {"name": name} | (planned or _planned(cells))
        self.client.log_text(run_id, yaml.safe_dump(config, sort_keys=False), "comparison.yaml")
        for cell in cells:
            self.cell(run_id, cell)
        self.client.set_terminated(run_id)
        return run_id

    def cell(self, parent: str, cell: Cell, status: str = "FINISHED") -> str:
        tags = {"mlflow.parentRunId": parent, "fedsim.kind": "cell", "fedsim.table": cell.table}
        tags |= {"fedsim.dataset": cell.dataset, "fedsim.defense": cell.defense, "fedsim.seed": str(cell.seed)}
        run_id = self.client.create_run(self.experiment, tags=tags).info.run_id
        self.client.log_text(run_id, json.dumps(_result(cell)), "result.json")
        config = {"name": "cell", "defense": {"name": cell.defense, **cell.config}, "seed": cell.seed}
        self.client.log_text(run_id, yaml.safe_dump(config), "config.yaml")
        self.client.log_text(run_id, _rounds(cell).to_csv(index=False), "rounds.csv")
        if cell.test_images:
            self._dataset(run_id, cell)
        if cell.images is not None:
            self._reconstructions(run_id, cell)
        self.client.set_terminated(run_id, status)
        return run_id

    def _dataset(self, run_id: str, cell: Cell) -> None:
        from mlflow.entities import Dataset, DatasetInput

        profile = json.dumps({"train": 100, "test": cell.test_images})
        entity = Dataset(cell.dataset, "digest", "local", cell.dataset, profile=profile)
        self.client.log_inputs(run_id, datasets=[DatasetInput(entity)])

    def _reconstructions(self, run_id: str, cell: Cell) -> None:
        for label, scores in _attacks(cell):
            path = self.folder / f"{label}-naive-r0.npz"
            originals = cell.images[:, None]
            np.savez(path, originals=originals, reconstructions=_blurred(originals, scores))
            self.client.log_artifact(run_id, str(path), "reconstructions")


def _planned(cells: list[Cell]) -> dict[str, Any]:
    return {
        "datasets": sorted({cell.dataset for cell in cells}),
        "seeds": sorted({cell.seed for cell in cells}),
        "tables": {cell.table: {"attack": {"name": cell.attack}} for cell in cells},
        "defenses": {cell.defense: {"name": cell.defense} for cell in cells},
    }


def _attacks(cell: Cell) -> list[tuple[str, list[float]]]:
    muted = [] if cell.muted is None else [(f"{cell.defense}_muted", cell.muted)]
    return [(cell.attack, cell.psnr), *muted]


def _blurred(originals: np.ndarray, psnr: list[float]) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=originals.shape)
    sigma = 255 * 10 ** (-np.asarray(psnr) / 20)
    noisy = originals + noise * sigma[:, None, None, None, None]
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _audits(cell: Cell) -> list[dict[str, Any]]:
    rows = []
    for label, scores in _attacks(cell):
        for index, psnr in enumerate(scores):
            ssim = cell.ssim[index] if cell.ssim and label == cell.attack else psnr / 100
            row = {"attack": label, "adversary": "naive", "round": 0, "victim": index, "client": index}
            row |= {"image": 0, "PSNR": psnr, "SSIM": ssim, "capped": psnr >= 100, "loss": 1e-3}
            row |= {"iterations": 300, "stalled": index < cell.stalled, "seconds": 1.0}
            rows.append(row | {"exhausted": cell.stalled <= index < cell.stalled + cell.exhausted})
    return rows


def _result(cell: Cell) -> dict[str, Any]:
    overhead = None
    if cell.overhead is not None:
        overhead = dict(zip(("median", "low", "high"), cell.overhead, strict=True)) | {"pairs": 20}
    result = {"name": "cell", "seed": cell.seed, "dataset": cell.dataset, "ACC": cell.acc, "ART": 0.25}
    result |= {"rounds": 30, "model_sha256": "ab" * 32, "upload_bytes": 53704.0, "audits": _audits(cell)}
    result |= {"floors": FLOORS, "overhead": overhead, "timing": {"local": 0.2, "defense": 0.01}}
    result |= {"faults": {"workers_lost": 0}, "versions": {"torch": "2.11.0", "python": "3.11.2"}}
    return result | {"hardware": {"cpu": "Some <CPU> & more", "cores": 2}}


def _rounds(cell: Cell) -> pd.DataFrame:
    rounds = np.arange(30)
    rising = cell.acc * (1 - np.exp(-(rounds + 1) / 6)) / (1 - np.exp(-5))
    accuracy = np.where((rounds + 1) % 5 == 0, rising, np.nan)
    return pd.DataFrame(
        {"round": rounds, "loss": 2.3 - rising, "ACC": accuracy, "seconds": 0.25, "upload_bytes": 53704}
    )


def small_cells() -> list[Cell]:
    """MNIST against DLG, one seed: GradDefense at the floor, GC above it, DP flagged, PLD undone by muting."""
    images = np.random.default_rng(1).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
    common = {"table": "dga", "dataset": "mnist", "images": images}
    return [
        Cell(defense="none", psnr=[44.0, 46.0, 48.0], ssim=[0.97, 0.98, 0.99], acc=0.92, **common),
        Cell(defense="graddefense", psnr=[5.0, 6.0, 7.0], acc=0.91, overhead=(0.04, 0.03, 0.05), **common),
        Cell(defense="gc", psnr=[20.0, 21.0, 22.0], acc=0.37, overhead=(0.01, 0.005, 0.015), **common),
        Cell(defense="dp_gaussian", psnr=[4.0, 4.1, 4.2], acc=0.86, stalled=1, exhausted=1, **common),
        Cell(defense="dp_laplacian", psnr=[5.0, 5.1, 5.2], acc=0.85, **common),
        Cell(defense="pld", psnr=[5.0, 5.5, 6.0], muted=[43.0, 45.0, 47.0], acc=0.9, **common),
    ]
