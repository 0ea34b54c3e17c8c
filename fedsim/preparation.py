"""What a simulation needs before any process starts; making it checks the whole input."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedsim.config import ExperimentConfig
from fedsim.data.datasets import Dataset, root_set
from fedsim.data.partitions import partition
from fedsim.data.public import PublicImages, PublicSource, public_images
from fedsim.engine.session import SessionSpec
from fedsim.errors import ConfigError
from fedsim.learning.fused import check_fusable
from fedsim.privacy import audit
from fedsim.privacy.observation import Victim


@dataclass(frozen=True)
class Prepared:
    """What a simulation needs before any process starts; making it checks the whole input.

    Attributes:
        dataset: The images.
        spec: The session that workers and server will open.
        victims: The victims of each audited round.
        public: The public images that attacks learn from, by where they come from.
    """

    dataset: Dataset
    spec: SessionSpec
    victims: dict[int, tuple[Victim, ...]]
    public: dict[PublicSource, PublicImages] = field(default_factory=dict)


def prepare(config: ExperimentConfig, dataset: Dataset, data_dir: Path | None = None) -> Prepared:
    """Split the data, build the model once, draw the victims and load what attacks learn from.

    Args:
        config: The experiment.
        dataset: Its data.
        data_dir: Where data sets of public images lie; see `load_dataset`.

    Raises:
        ConfigError: If the data cannot be split so, the model does not fit, a user's own defense or attack cannot
            be made, no client has enough images, or public images are missing or do not fit.
    """
    federation = config.federation
    root, rest = root_set(dataset, federation.root_per_class, config.seed)
    parts = partition(dataset.train_labels, rest, federation.clients, config.data.partition, config.seed)
    spec = SessionSpec(config, parts, root)
    model = spec.build_model(dataset)
    if config.runtime.execution == "fused":
        check_fusable(model)
    check_factories(config)
    rounds = config.audit.rounds if config.attacks else ()
    if config.audit.payload == "probe":
        victims = {round_: audit.choose_victims(config, parts, round_) for round_ in rounds}
    else:
        victims = {round_: _training_victims(spec, round_) for round_ in rounds}
    sizes = sorted({len(victim.images) for those in victims.values() for victim in those})
    for size in sizes:
        for attack in config.attacks:
            attack.check(model, size)
            if config.audit.local_learning_rate == "estimated":
                attack.check_unknown_rate()
    sources = {attack.public_source for attack in config.attacks if attack.public_source}
    public = {source: public_images(source, dataset, data_dir) for source in sorted(sources)}
    for attack in config.attacks:
        if attack.public_source and sizes:
            attack.check_public(len(public[attack.public_source].labels), sizes[-1])
    return Prepared(dataset, spec, victims, public)


def check_factories(config: ExperimentConfig) -> None:
    """See that the defense and the attacks can be made: of users' own only the factories' names are known so far.

    Raises:
        ConfigError: If one cannot.
    """
    config.defense.build()
    for attack in config.attacks:
        attack.build()


def _training_victims(spec: SessionSpec, round_: int) -> tuple[Victim, ...]:
    """Return the first clients of the round's cohort, with the batches that they train on.

    Raises:
        ConfigError: If no client takes part, or none trains on batches of one size, and on no image twice, as
            attacks assume.
    """
    cohort = spec.cohort(round_)[: spec.config.audit.victims]
    if not cohort:
        raise ConfigError(f"audit.payload: training: no client reports in time in round {round_}")
    schedules = dict(zip(cohort, spec.schedules(round_, cohort), strict=True))
    images = {client: np.concatenate(batches) for client, batches in schedules.items()}
    able = [c for c in cohort if len(set(map(len, schedules[c]))) == 1 and len(set(images[c])) == len(images[c])]
    if not able:
        raise ConfigError(
            "audit.payload: training needs local batches of one size that use each image once; set "
            f"federation.local_steps × batch_size to at most a client's images ({len(set(images[cohort[0]]))})"
        )
    size = max(len(images[client]) for client in able)
    same = [client for client in able if len(images[client]) == size]
    return tuple(Victim(c, images[c], stream=c, steps=len(schedules[c])) for c in same)
