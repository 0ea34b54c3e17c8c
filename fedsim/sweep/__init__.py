"""Sweeps over settings of an experiment, on Ray Tune.

What MLflow holds of a sweep, and analysis reads: a parent run tagged `fedsim.kind: sweep`, `fedsim.name` and
`fedsim.id`; below it a run a simulation, as `fedsim run` logs one, tagged `fedsim.kind: trial`, `fedsim.sweep`,
`fedsim.trial` (the point; the same after a resume), `fedsim.dataset`, `fedsim.defense`, `fedsim.seed`. A trial
that was stopped early is FINISHED and has the tag `fedsim.stopped` (the round) in place of final figures; a FAILED
one has the tag `fedsim.reason`.
"""
