"""The commands of the command line, one file a subject. Heavy modules are imported when a command runs."""

from fedsim.commands import attack, compare, reading, run, scale, sweep
from fedsim.commands.base import Command

ALL = (
    Command("run", "one simulation: training under a defense, audited by attacks", run.run_arguments, run.run),
    Command("attack", "attack a gradient or update of your own", attack.attack_arguments, attack.attack),
    Command("compare", "the tables: defenses × attacks × data sets", compare.compare_arguments, compare.compare),
    Command("sweep", "a search over settings, on Ray Tune", sweep.sweep_arguments, sweep.sweep),
    Command("scale", "round time against clients, workers and defense", scale.scale_arguments, scale.scale),
    Command(
        "tables", "print the tables of a comparison again, from MLflow", reading.reading_arguments, reading.tables
    ),
    Command(
        "report",
        "write tables, figures and report.html again, from MLflow",
        reading.reading_arguments,
        reading.report,
    ),
    Command("ui", "browse results in MLflow's web page, on loopback", reading.ui_arguments, reading.ui),
    Command(
        "list",
        "what a config can name: data sets, models, defenses, attacks, presets",
        reading.catalogue_arguments,
        reading.catalogue,
    ),
    Command("validate", "check a config without running it", run.validate_arguments, run.validate),
)
