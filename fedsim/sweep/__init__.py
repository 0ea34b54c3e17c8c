"""Sweeps: many simulations over a search space, on Ray Tune.

What a sweep leaves in MLflow (the contract with `analysis/`):

* One parent run a sweep, with the tags `fedsim.kind=sweep`, `fedsim.name` (the sweep's name) and `fedsim.id`; its
  artifact `sweep.yaml` is the sweep as it was read.
* One child a trial (a trial is one point of the space with one seed), with the tags `fedsim.kind=trial`,
  `fedsim.sweep` (the sweep's name), `fedsim.trial` (the trial's number in four digits, the same after a resume),
  `fedsim.point` (the point's number; the trials of one point differ in the seed only), `fedsim.dataset`,
  `fedsim.defense` (the defense's name in the config, or its label in the comparison), `fedsim.seed`,
  `mlflow.parentRunId`; a trial of a sweep over a comparison also has `fedsim.table`.
* Params: the resolved config by dotted path. Metrics, curves and artifacts: those of a single run, as
  `TrackedRun.round` and `TrackedRun.result` log them.
* Status: FINISHED is a trial that ran to its end, or one that a scheduler or a stop rule ended early: such a one
  has the tag `fedsim.stopped` (the round) and no final metrics. FAILED has the tag `fedsim.reason`.
"""
