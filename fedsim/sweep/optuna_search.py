"""Optuna as Ray Tune's searcher: conditional spaces, several objectives, and a study that survives the driver."""

from pathlib import Path
from typing import Any

import optuna
from ray.tune.search import Searcher

from fedsim.sweep.config import Objective, OptunaSearchConfig
from fedsim.sweep.space import Space

STUDY = "sweep"


class OptunaPoints(Searcher):  # type: ignore[misc]
    """Asks Optuna for points and tells it what came of them.

    Ray's own wrapper takes no conditional space when results of an earlier session are to be counted, and wants
    the objective in every report. Here the study lies in a file, and only the end of a trial counts.

    Source: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011 (the sampler).
    """

    def __init__(
        self,
        space: Space,
        objectives: tuple[Objective, ...],
        seeds: tuple[int, ...],
        settings: OptunaSearchConfig,
        file: Path,
    ) -> None:
        """Open the study in `file`; points of an earlier session that did not end are tried again first."""
        super().__init__()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.objectives, self.seeds = space, objectives, seeds
        storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
        known = [found.study_name for found in optuna.get_all_study_summaries(storage)]
        done = len(optuna.load_study(study_name=STUDY, storage=storage).trials) if STUDY in known else 0
        # A resumed sampler must not repeat its first draws.
        sampler = optuna.samplers.TPESampler(seed=settings.seed + done, n_startup_trials=settings.startup_trials)
        better = {"max": optuna.study.StudyDirection.MAXIMIZE, "min": optuna.study.StudyDirection.MINIMIZE}
        directions = [better[objective.direction] for objective in objectives]
        self.study = optuna.create_study(
            storage=storage, sampler=sampler, study_name=STUDY, directions=directions, load_if_exists=True
        )
        for trial in self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            self.study.enqueue_trial(trial.params)
        self.asked: dict[str, optuna.trial.Trial] = {}

    @property
    def finished(self) -> int:
        """Number of points that have come to their end, in this session or an earlier one."""
        ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        return len(self.study.get_trials(states=ended))

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the settings of a new trial."""
        self.asked[trial_id] = self.study.ask()
        return {"trial": {"point": self.space.suggest(self.asked[trial_id]), "seeds": list(self.seeds)}}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study the objectives of a trial that ended, or that it was stopped or failed."""
        state = optuna.trial.TrialState
        if error or result is None or "error" in result:
            self.study.tell(self.asked[trial_id], state=state.FAIL)
        elif result.get("finished"):
            self.study.tell(self.asked[trial_id], [result[objective.metric] for objective in self.objectives])
        else:
            self.study.tell(self.asked[trial_id], state=state.PRUNED)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study is in its file."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the study is in its file."""
