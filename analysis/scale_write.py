"""Write and print what the scalability study found."""

import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from analysis import scale_figures, scale_tables
from analysis.names import dataset_title
from analysis.style import look_and_feel, save
from analysis.write import publish
from fedsim import environment
from fedsim.scale.study import ScaleStudy, points


def write_study(study: ScaleStudy) -> dict[str, Path]:
    """Write `scale.md` and the figures beside the study's table; return the files by their path there."""
    draft = Path(tempfile.mkdtemp(prefix=".analysis-", dir=study.folder))
    try:
        text = scale_tables.markdown(_sections(study), _heading(study))
        (draft / "scale.md").write_text(text, encoding="utf-8")
        table, config = study.table, study.config
        with look_and_feel():
            figures = {
                "round_time": scale_figures.draw_round_time(table, config, points(table, config)),
                "speed_up": scale_figures.draw_speed_up(table, config),
                "where_the_time_goes": scale_figures.draw_parts(table, config),
                "chunk_width": scale_figures.draw_widths(table, config),
            }
            for name, figure in figures.items():
                if figure:
                    save(figure, draft / "figures" / f"{name}.png")
        return publish(draft, study.folder)
    finally:
        shutil.rmtree(draft)


def print_study(study: ScaleStudy, console: Console) -> None:
    """Print the tables."""
    scale_tables.print_sections(_sections(study), console)


def _sections(study: ScaleStudy) -> list[scale_tables.Section]:
    table = study.table
    return scale_tables.sections(table, study.config, points(table, study.config), study.left_out)


def _heading(study: ScaleStudy) -> list[str]:
    config, machine = study.config, environment.hardware()
    federation = config.experiment.federation
    work = f"{federation.local_steps or 'whole epochs of'} local step(s)"
    facts = environment.versions()
    return [
        f"Scalability study {config.name}",
        f"Workload: {config.experiment.model.name} on {dataset_title(config.experiment.data.name)}, batch "
        f"{federation.batch_size}, {work}, {config.images} images a client.",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, GPU "
        f"{machine['gpu']}; {config.nodes} Ray node(s). Rounds went by Ray's calls, as on a cluster; on one "
        "machine they go by sockets, and take less.",
        f"Versions: Python {facts['python']}, PyTorch {facts['torch']}, Ray {facts['ray']}, fedsim "
        f"{facts.get('commit', facts.get('fedsim', ''))}.",
        f"Command: `fedsim {' '.join(sys.argv[1:])}`",
    ]
