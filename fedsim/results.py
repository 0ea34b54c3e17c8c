"""What a simulation leaves: frames in memory, files in its folder.

pandas is imported where it is used: a run's first round need not wait for it.
"""

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import yaml
from numpy.typing import NDArray

from fedsim import environment
from fedsim.config import ExperimentConfig, parse_config
from fedsim.engine.overhead import Overhead
from fedsim.engine.pool import Faults
from fedsim.errors import ConfigError
from fedsim.files import check_folder, write_atomically
from fedsim.learning.execution import Execution
from fedsim.privacy.audit import AuditRow
from fedsim.settings import read_yaml

if TYPE_CHECKING:
    import pandas as pd

ROUND_COLUMNS = ("local_seconds", "defense_seconds", "aggregate_seconds", "compensate_seconds", "idle_seconds")
PARTICIPATION_COLUMNS = ("clients_dropped", "clients_late", "late_bytes", "simulated_seconds")
"""What a round tells of clients that did not report in time, where there can be such."""


@dataclass(frozen=True)
class AuditResult:
    """One attack on the victims of one round.

    Attributes:
        attack: Label of the attack.
        adversary: What the attacker knew.
        strategy: What it made of that; "" is the plain attack.
        round: The round.
        rows: One row an image.
        originals: Private images as bytes, shape [N, B, C, H, W].
        reconstructions: What the attack returned, clamped, as bytes, same shape.
    """

    attack: str
    adversary: str
    strategy: str
    round: int
    rows: list[AuditRow]
    originals: NDArray[np.uint8]
    reconstructions: NDArray[np.uint8]

    @property
    def stem(self) -> str:
        """Name of its files."""
        return audit_stem(self.attack, self.adversary, self.strategy, self.round)

    def mean(self, metric: str) -> float:
        """Return the mean of `PSNR` or `SSIM` over the images."""
        return float(np.mean([getattr(row, metric) for row in self.rows]))

    def describe(self) -> str:
        """Return one line that says how it went."""
        unsound = sum(row.stalled or row.exhausted for row in self.rows)
        knew = " ".join(filter(None, (self.adversary, self.strategy)))
        warning = f"; {unsound} stalled or out of budget" if unsound else ""
        return (
            f"{self.attack} ({knew}) before round {self.round}: PSNR {self.mean('PSNR'):.2f} dB, "
            f"SSIM {self.mean('SSIM'):.3f} over {len(self.rows)} images{warning}"
        )


def audit_stem(attack: str, adversary: str, strategy: str, round_: int) -> str:
    """Return the name of an audit's files and, before the metric's, of its metrics."""
    return "-".join(filter(None, (attack, adversary, strategy, f"r{round_}")))


@dataclass
class SimulationResult:
    """What a simulation found.

    Attributes:
        config: The resolved experiment.
        summary: What `result.json` holds: ACC (0–1), ART (s), PSNR (dB), SSIM, audits, floors, faults, timing, …
        rounds: One row a round: loss, ACC where it was evaluated, seconds, bytes.
        audits: The audits, with pictures.
    """

    config: ExperimentConfig
    summary: dict[str, Any]
    rounds: "pd.DataFrame"
    audits: list[AuditResult] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Accuracy of the final model on the test set, 0–1 (ACC)."""
        return float(self.summary["ACC"])

    @property
    def average_round_time(self) -> float:
        """Mean seconds a round, the first left out (ART)."""
        return float(self.summary["ART"])

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rounds as records; what was not measured in a round is not in its record."""
        import pandas as pd

        records = self.rounds.to_dict(orient="records")
        return [{str(k): v for k, v in record.items() if not pd.isna(v)} for record in records]

    @property
    def images(self) -> "pd.DataFrame":
        """One row a reconstructed image, as `AuditRow` describes."""
        import pandas as pd

        return pd.DataFrame(self.summary["audits"])


class RunFolder:
    """The folder of one simulation: config, result, rounds, reconstructions and checkpoints."""

    def __init__(self, path: Path) -> None:
        """Use `path`; nothing is created yet."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.reconstructions = path / "reconstructions"

    def check(self, config: ExperimentConfig, resume: bool) -> None:
        """See that the folder is free for this experiment; nothing is written.

        Raises:
            ConfigError: If it holds another experiment, or this one and `resume` was not asked for.
        """

        def is_same(saved: Path) -> bool:
            return parse_config(read_yaml(saved), str(saved)).fingerprint() == config.fingerprint()

        check_folder(self.path, "config.yaml", "experiment", is_same, resume)

    def claim(self, config: ExperimentConfig) -> None:
        """Write the resolved experiment, which makes the folder this experiment's."""
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        write_atomically(self.path / "config.yaml", text.encode())

    def finished(self) -> dict[str, Any] | None:
        """Return the summary of a finished run, None while there is none."""
        try:
            summary: dict[str, Any] = json.loads((self.path / "result.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return summary

    def save_audit(self, audit: AuditResult) -> None:
        """Write an audit's pictures and rows, so that a resume need not attack again."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, originals=audit.originals, reconstructions=audit.reconstructions)
        write_atomically(self.reconstructions / f"{audit.stem}.npz", buffer.getvalue())
        write_json(self.reconstructions / f"{audit.stem}.json", [asdict(row) for row in audit.rows])

    def load_audit(self, attack: str, adversary: str, strategy: str, round_: int) -> AuditResult | None:
        """Return an audit written before, None if there is none.

        Raises:
            ConfigError: If its images are missing or damaged.
        """
        stem = audit_stem(attack, adversary, strategy, round_)
        rows, images = (self.reconstructions / f"{stem}.{kind}" for kind in ("json", "npz"))
        if not rows.exists():
            return None
        try:
            with np.load(images) as arrays:
                originals, reconstructions = arrays["originals"], arrays["reconstructions"]
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise ConfigError(
                f"{images} is missing or damaged; put it back, or delete {self.path} to run it again"
            ) from error
        parsed = [AuditRow(**row) for row in json.loads(rows.read_text(encoding="utf-8"))]
        return AuditResult(attack, adversary, strategy, round_, parsed, originals, reconstructions)

    def load_result(self) -> SimulationResult:
        """Read a finished run back."""
        import pandas as pd

        summary = self.finished()
        if summary is None:
            raise ConfigError(f"{self.path} holds no finished run")
        config = parse_config(read_yaml(self.path / "config.yaml"), str(self.path / "config.yaml"))
        names = ("attack", "adversary", "strategy", "round")
        keys = {tuple(a[name] for name in names): None for a in summary["audits"]}
        audits = [audit for key in keys if (audit := self.load_audit(*key))]
        return SimulationResult(config, summary, pd.read_csv(self.path / "rounds.csv"), audits)

    def save_result(self, result: SimulationResult) -> None:
        """Write `rounds.csv`, the grids, and last `result.json`, which marks the run as finished."""
        for audit in result.audits:
            write_atomically(self.reconstructions / f"{audit.stem}.png", picture(audit))
        write_atomically(self.path / "rounds.csv", result.rounds.to_csv(index=False).encode())
        write_json(self.path / "result.json", result.summary)


def write_json(path: Path, data: object) -> None:
    """Write `data` as readable JSON, atomically; numbers that are not finite become null, which JSON has."""
    write_atomically(path, (json.dumps(_finite(data), indent=2, allow_nan=False) + "\n").encode())


def _finite(data: object) -> object:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def picture(audit: AuditResult, most: int = 16) -> bytes:
    """Return a PNG of up to `most` originals, each above its reconstruction, three times enlarged."""
    return grid(
        [images.reshape(-1, *images.shape[2:])[:most] for images in (audit.originals, audit.reconstructions)]
    )


def grid(rows: Sequence[NDArray[np.uint8]]) -> bytes:
    """Return a PNG of rows of as many images each, [n, C, H, W], three times enlarged."""
    from PIL import Image

    padded = [np.pad(row, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=255) for row in rows]
    grid = np.concatenate([np.concatenate(list(row), axis=2) for row in padded], axis=1).transpose(1, 2, 0)
    image = Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid)
    buffer = io.BytesIO()
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


def timing(rounds: "pd.DataFrame") -> dict[str, float]:
    """Return mean seconds a round by where they went (worker times summed over workers), without round 0."""
    counted = rounds.iloc[1:] if len(rounds) > 1 else rounds
    return {name.removesuffix("_seconds"): float(counted[name].mean()) for name in ROUND_COLUMNS}


def summarize(
    config: ExperimentConfig,
    history: Sequence[dict[str, Any]],
    audits: Sequence[AuditResult],
    weights: NDArray[np.float32],
    floors: dict[str, dict[str, float]],
    overhead: Overhead | None,
    faults: Faults,
    execution: Execution,
    transport: str,
) -> SimulationResult:
    """Gather what a simulation found into its result."""
    import pandas as pd

    rounds = pd.DataFrame(history)
    counted = rounds["seconds"].iloc[1:] if len(rounds) > 1 else rounds["seconds"]
    rows = [asdict(row) for audit in audits for row in audit.rows]
    summary = {
        "name": config.name,
        "seed": config.seed,
        "dataset": config.data.name,
        "ACC": float(rounds["ACC"].iloc[-1]),
        "ART": float(counted.mean()),
        "rounds": len(rounds),
        "model_sha256": hashlib.sha256(weights.tobytes()).hexdigest(),
        "upload_bytes": float(rounds["upload_bytes"].mean()),
        "audits": rows,
        "floors": floors,
        "overhead": asdict(overhead) if overhead else None,
        "timing": timing(rounds),
        "faults": {**asdict(faults), "clients_rejected": int(rounds["clients_rejected"].sum())},
        "participation": {n: float(rounds[n].sum()) for n in PARTICIPATION_COLUMNS if n in rounds} or None,
        "execution": execution,
        "transport": transport,
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "fingerprint": config.fingerprint(),
        "config": config.to_dict(),
    }
    return SimulationResult(config, summary, rounds, list(audits))
