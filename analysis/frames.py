"""The frames of a comparison: one row a cell, an image, a round, a floor."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.names import BASELINE, is_muted

NAIVE = "naive"
"""The adversary of the slides' tables: it does not know that there is a defense."""

KEY = ["table", "dataset", "defense", "seed"]
IMAGE_COLUMNS = (
    "attack adversary strategy round victim client image label PSNR SSIM capped loss iterations stalled exhausted "
    "seconds learned"
).split()


class CellKey(NamedTuple):
    """Which cell of a comparison: one training run under one defense, audited by the attack of one table."""

    table: str
    dataset: str
    defense: str
    seed: int

    def __str__(self) -> str:
        """Return the key as a file name."""
        return f"{self.table}-{self.dataset}-{self.defense}-seed{self.seed}"


def frames(loaded: dict[CellKey, dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """Return `cells`, `images`, `rounds` and `floors`, as `load.Comparison` describes them.

    Args:
        loaded: By cell: `run_id`, `artifacts`, `test_images`, `result` (of `result.json`) and `rounds`.
    """
    return {
        "cells": pd.DataFrame([_cell_row(key, cell) for key, cell in sorted(loaded.items())]),
        "images": _images(loaded),
        "rounds": pd.concat([_keyed(key, cell["rounds"]) for key, cell in sorted(loaded.items())]),
        "floors": pd.DataFrame(
            [
                {**key._asdict(), "guess": guess, **values}
                for key, cell in sorted(loaded.items())
                for guess, values in (cell["result"].get("floors") or {}).items()
            ],
            columns=[*KEY, "guess", "PSNR", "SSIM"],
        ),
    }


def _cell_row(key: CellKey, cell: dict[str, Any]) -> dict[str, Any]:
    result = cell["result"]
    overhead = result.get("overhead") or {}
    plain = {name: result.get(name) for name in ("ACC", "ART", "rounds", "upload_bytes")}
    spread = {f"overhead_{end}": overhead.get(end, np.nan) for end in ("low", "high", "pairs")}
    return {
        **key._asdict(),
        "run_id": cell["run_id"],
        "artifacts": cell["artifacts"],
        "test_images": cell["test_images"],
        **plain,
        "overhead": overhead.get("median", np.nan),
        **spread,
    }


def _images(loaded: dict[CellKey, dict[str, Any]]) -> pd.DataFrame:
    frames = []
    for key, cell in sorted(loaded.items()):
        frame = pd.DataFrame(cell["result"].get("audits") or [], columns=IMAGE_COLUMNS)
        frame["column"] = _table_column(key, frame)
        frames.append(_keyed(key, frame))
    images = pd.concat(frames, ignore_index=True)
    images[["PSNR", "SSIM"]] = images[["PSNR", "SSIM"]].astype(float)
    flags = ["capped", "stalled", "exhausted"]
    images[flags] = images[flags].fillna(False).astype(bool)
    images["learned"] = images["learned"].fillna("").astype(str)
    return images


def _table_column(key: CellKey, audits: pd.DataFrame) -> pd.Series:
    """Return the column of the tables in which each audit counts: its defense's, or that of a muted attack.

    The cell's own attack is the first that it lists; others, and other adversaries than the naive one, stand in
    `images.csv` and the report's list of all audits only.
    """
    labels = audits["attack"].astype(str)
    own = next((label for label in labels if not is_muted(label)), "")
    column = labels.where(labels.map(is_muted).astype(bool) & (key.defense != BASELINE), "")
    column = column.mask(labels == own, key.defense)
    return column.where(audits["adversary"] == NAIVE, "")


def _keyed(key: CellKey, frame: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([pd.DataFrame([key._asdict()] * len(frame), columns=KEY), frame], axis=1)
