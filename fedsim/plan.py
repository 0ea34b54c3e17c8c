"""What a command is about to do, and what one simulation found, for a terminal."""

from collections.abc import Sequence
from pathlib import Path

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from fedsim.comparison import Comparison
from fedsim.config import ExperimentConfig
from fedsim.environment import local_device
from fedsim.preparation import Prepared
from fedsim.results import SimulationResult

PROCESS_BYTES = 350 * 2**20
"""A Ray process that has imported PyTorch."""
COPIES = 4
"""Copies of a chunk's update matrix that training and a defense hold at once."""


def memory_estimate(config: ExperimentConfig, prepared: Prepared, workers: int) -> int:
    """Return about how many bytes a simulation needs: processes, shared data, and the chunks in the making."""
    data = prepared.dataset
    shared: int = data.train_images.nbytes + data.test_images.nbytes
    dimension = prepared.spec.build_model(data).layout.dimension
    width = config.chunk_width(config.federation.clients_per_round, local_device())
    batch = config.federation.batch_size * int(data.train_images[0].size) * 4
    return (workers + 2) * PROCESS_BYTES + shared + workers * width * (COPIES * dimension * 4 + batch)


def of_memory(wanted: int) -> str:
    """Return in words how many bytes are wanted, and how many there are."""
    return f"about {wanted / 2**30:.1f} of this machine's {psutil.virtual_memory().total / 2**30:.1f} GiB"


def print_plan(config: ExperimentConfig, prepared: Sequence[Prepared], console: Console) -> None:
    """Print the resolved config of a simulation, the data it would use and the memory it would need."""
    console.print(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), highlight=False, end="")
    workers = local_workers(config)
    for one in prepared:
        sizes = one.spec.partition.sizes
        console.print(
            f"# {len(one.dataset.train_labels):,} training images, {sizes.min()} to {sizes.max()} a client; "
            f"{len(one.dataset.test_labels):,} to test; {workers} workers here, "
            f"{of_memory(memory_estimate(config, one, workers))}",
            highlight=False,
            soft_wrap=True,
        )


def print_comparison_plan(comparison: Comparison, console: Console) -> None:
    """Print the resolved comparison, its cells, and the memory of the largest."""
    config = comparison.config
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    console.print(text, highlight=False, end="")
    rounds = sum(cell.config.federation.rounds for cell in comparison.cells)
    victims = sum(len(cell.config.attacks) * cell.config.audit.victims for cell in comparison.cells)
    workers = local_workers(comparison.cells[0].config)
    largest = max(memory_estimate(p.spec.config, p, workers) for p in comparison.by_dataset().values())
    console.print(
        f"# {len(comparison.cells)} cells, {rounds:,} rounds, {victims} reconstructions; "
        f"{workers} workers here, {of_memory(largest)}; "
        f"output in {comparison.folder}",
        highlight=False,
        soft_wrap=True,
    )


def local_workers(config: ExperimentConfig) -> int:
    """Return how many workers this machine would start."""
    from fedsim.engine.runtime import local_cpus

    return local_cpus() if config.runtime.workers == "auto" else config.runtime.workers


def print_result(result: SimulationResult, folder: Path, console: Console) -> None:
    """Print what a simulation found."""
    summary = result.summary
    console.print(
        f"[bold]{result.config.name}[/bold]: ACC {summary['ACC']:.4f}, ART {summary['ART']:.4f} s, "
        f"{summary['upload_bytes'] / 1000:.1f} kB a client a round",
        highlight=False,
    )
    if summary["overhead"]:
        over = summary["overhead"]
        console.print(
            f"the defense costs {over['median']:+.1%} of a round (quartiles {over['low']:+.1%} to "
            f"{over['high']:+.1%}, {over['pairs']} pairs of rounds)",
            highlight=False,
        )
    if result.audits:
        table = Table(box=None, header_style="bold")
        for column in ("attack", "adversary", "round", "images", "PSNR dB", "SSIM", "stalled", "out of budget"):
            table.add_column(column, justify="left" if column in ("attack", "adversary") else "right")
        for audit in result.audits:
            rows = audit.rows
            table.add_row(
                audit.attack,
                audit.adversary,
                str(audit.round),
                str(len(rows)),
                f"{audit.mean('PSNR'):.2f}",
                f"{audit.mean('SSIM'):.3f}",
                str(sum(r.stalled for r in rows)),
                str(sum(r.exhausted for r in rows)),
            )
        best = max(summary["floors"].items(), key=lambda item: item[1]["PSNR"])
        table.add_row(f"floor ({best[0]})", "", "", "", f"{best[1]['PSNR']:.2f}", f"{best[1]['SSIM']:.3f}", "", "")
        console.print(table)
    console.print(f"wrote {folder}", highlight=False, soft_wrap=True)
