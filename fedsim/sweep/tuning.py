"""What Ray Tune is told of a sweep: who proposes trials, who ends them early, and where they keep checkpoints."""

import os
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from fedsim.sweep.config import AshaConfig, MedianConfig, OptunaSearchConfig, PbtConfig, SweepConfig
from fedsim.sweep.evolution import population
from fedsim.sweep.outcomes import Outcome, OutcomeFolder
from fedsim.sweep.progress import StopRule, SweepProgress
from fedsim.sweep.resources import reserve, trials_at_a_time
from fedsim.sweep.trial import TrialContext, run_trial

# Relative paths of the user keep their meaning, a report need not hold every objective, and nobody needs Tune's
# own progress and logs beside ours and MLflow's.
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Tuning:
    """One session of Ray Tune on a sweep.

    Attributes:
        config: The sweep.
        folder: Its folder.
        outcomes: How its trials ended so far.
        plan: The trials of a grid or random search, none of them begun.
        storage: Where checkpoints are kept; None: the sweep's folder.
    """

    config: SweepConfig
    folder: Path
    outcomes: OutcomeFolder
    plan: list[Outcome]
    storage: str | None

    @property
    def evolving(self) -> bool:
        """Whether trials take over from each other."""
        return isinstance(self.config.scheduler, PbtConfig)

    def search(self) -> tuple[Any, dict[str, Any], int]:
        """Return the searcher (None: the grid that follows), Tune's space, and the number of trials to run."""
        config = self.config
        if isinstance(config.search, OptunaSearchConfig):
            from fedsim.sweep.optuna_search import OptunaPoints

            file = self.folder / "optuna.db"
            search = OptunaPoints(config.parsed_space(), config.objectives, config.seeds, config.search, file)
            return search, {}, (config.budget.trials or 0) - search.finished
        if self.evolving and len(self.outcomes.every()) < len(self.plan):
            shutil.rmtree(self.outcomes.path, ignore_errors=True)
        rest = [
            {"point": planned.point, "seeds": list(planned.seeds)}
            for planned in self.plan
            if not self.outcomes.load(planned).done
        ]
        if self.evolving and self.outcomes.every():
            rest = []
        return None, {"trial": tune.grid_search(rest)}, len(rest)

    def scheduler(self) -> TrialScheduler:
        """Return who ends trials early, or lets them take over from each other."""
        scheduler, first = self.config.scheduler, self.config.objectives[0]
        if isinstance(scheduler, AshaConfig):
            points = self.config.parsed_space().corners(grid=True)
            experiments = (self.config.experiment_at(point, self.config.seeds[0]) for point in points)
            most = max(experiment.federation.rounds for experiment in experiments) * len(self.config.seeds)
            return AsyncHyperBandScheduler(
                time_attr="round",
                metric=first.metric,
                mode=first.direction,
                # One more than there are rounds: whoever comes to the end still has the last audits before it.
                max_t=most + 1,
                grace_period=min(scheduler.grace_rounds, most),
                reduction_factor=scheduler.reduction_factor,
            )
        if isinstance(scheduler, MedianConfig):
            return MedianStoppingRule(
                time_attr="round", metric=first.metric, mode=first.direction, grace_period=scheduler.grace_rounds
            )
        if isinstance(scheduler, PbtConfig):
            return population(self.config, scheduler)
        return FIFOScheduler()

    def tuner(
        self,
        context: TrialContext,
        search: Any,
        space: dict[str, Any],
        trials: int,
        progress: SweepProgress,
        rule: StopRule,
    ) -> tune.Tuner:
        """Return what runs the trials.

        Args:
            context: What they share.
            search: The searcher; None: the grid in `space`.
            space: Tune's space.
            trials: Number of trials to run.
            progress: Is told how they end.
            rule: Ends them early.
        """
        # A population meets only if Tune knows all of it, also those that wait for a place.
        pending = {"TUNE_MAX_PENDING_TRIALS_PG": str(trials)} if self.evolving else {}
        os.environ.update(ENVIRONMENT | pending)
        # Both go to every trial's process.
        trainable = tune.with_parameters(run_trial, context=context)
        return tune.Tuner(
            tune.with_resources(trainable, partial(reserve, self.config)),
            param_space=space,
            tune_config=tune.TuneConfig(
                num_samples=trials if search else 1,
                search_alg=search,
                scheduler=self.scheduler(),
                max_concurrent_trials=self.config.concurrent
                or (trials_at_a_time(self.config) if search else None),
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name=f"session-{time.time_ns()}",
                storage_path=self._storage_path(),
                failure_config=tune.FailureConfig(max_failures=self.config.retries),
                # In a population a trial may be told to go on from what another has just replaced.
                checkpoint_config=tune.CheckpointConfig(num_to_keep=4 if self.evolving else 1),
                stop=rule,
                callbacks=[progress],
                verbose=0,
            ),
        )

    def _storage_path(self) -> str:
        if self.storage is None:
            return str(self.folder / "tune")
        place = self.storage if "://" in self.storage else str(Path(self.storage).resolve())
        return f"{place.rstrip('/')}/{self.config.name}"
