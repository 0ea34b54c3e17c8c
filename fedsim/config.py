"""The whole experiment in one schema: YAML in, one clear line out when it is wrong."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, field_validator, model_validator

from fedsim.aggregation.pairwise import power_of_two
from fedsim.attacks import AttackConfig
from fedsim.data.datasets import DatasetConfig, DigitsConfig
from fedsim.defenses import DefenseConfig, NoDefenseConfig
from fedsim.errors import ConfigError
from fedsim.learning.execution import Execution, choose_execution, choose_memory_format
from fedsim.learning.models import LeNetConfig, ModelConfig
from fedsim.learning.server_optimizers import ServerOptimizerConfig, SgdConfig
from fedsim.learning.training import MemoryFormat, Precision
from fedsim.participation import StragglersConfig, sample_size
from fedsim.privacy.observation import Adversary, Parameters
from fedsim.schema import NAME, Schema, explain
from fedsim.settings import merged, parse_overrides, read_yaml


class FederationConfig(Schema):
    """Who trains, how long and with which optimisers."""

    rounds: int = Field(default=100, ge=1)
    """Rounds of training."""
    clients: int = Field(default=100, ge=1)
    """Clients that the data is split over."""
    clients_per_round: int = Field(default=10, ge=1)
    """Size of the cohort drawn anew each round."""
    min_clients: int = Field(default=1, ge=1)
    """Fewest clients whose updates must be usable in a round; with fewer the run fails."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a sampled client never reports."""
    stragglers: StragglersConfig | None = None
    """How long clients take, in simulated time, and the server's deadline; null: none is late."""
    over_sampling: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    """Clients sampled for each of `clients_per_round`; the first `clients_per_round` to report count."""
    local_steps: int | None = Field(default=1, ge=1)
    """Local SGD steps a round; 1 is FedSGD; null: whole epochs, `local_epochs` of them (FedAvg)."""
    local_epochs: int = Field(default=1, ge=1)
    """Local epochs a round when `local_steps` is null."""
    batch_size: int = Field(default=32, ge=1)
    """Images a local step."""
    learning_rate: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """The clients' learning rate."""
    server: ServerOptimizerConfig = SgdConfig()
    """Server optimiser, applied to learning rate × aggregate."""
    root_per_class: int = Field(default=5, ge=1)
    """Training images of each class that are public and held by no client: what defenses prepare on."""
    evaluate_every: int = Field(default=10, ge=1)
    """Rounds between evaluations on the test set; the last round is always evaluated."""

    @model_validator(mode="after")
    def _cohort_fits(self) -> "FederationConfig":
        if self.clients_per_round > self.clients:
            raise ValueError(
                f"clients_per_round is {self.clients_per_round}, but there are {self.clients} clients"
            )
        if self.min_clients > self.clients_per_round:
            raise ValueError(
                f"min_clients is {self.min_clients}, but clients_per_round is {self.clients_per_round}"
            )
        sampled = sample_size(self.clients_per_round, self.over_sampling)
        if sampled > self.clients:
            raise ValueError(f"over_sampling asks for {sampled} clients a round, but there are {self.clients}")
        return self

    @property
    def everyone_reports(self) -> bool:
        """Whether each sampled client's update is used."""
        return not self.dropout and self.stragglers is None and self.over_sampling == 1


class AuditConfig(Schema):
    """What an honest-but-curious server is tried on."""

    rounds: tuple[int, ...] = (0,)
    """Rounds before which the global weights are attacked: 0 is the untrained model, `rounds` the trained one."""
    victims: int = Field(default=8, ge=1)
    """Victims a round, each another client while there are enough."""
    batch_size: int = Field(default=1, ge=1)
    """Images behind a probe gradient."""
    payload: Literal["probe", "training"] = "probe"
    """`probe`: a protected gradient of `batch_size` images; `training`: the very update that a client contributes,
    whose local steps the attacker simulates."""
    local_learning_rate: Literal["known", "estimated"] = "known"
    """Whether the attacker knows the clients' learning rate; if not, it sees how far the weights were moved, not
    by which gradient, and estimates the rate. For the naive adversary alone: the others' strategies need it."""
    adversaries: tuple[Adversary, ...] = Field(default=("naive",), min_length=1)
    """What the attacker knows of the defense; `naive`: not that there is one; `adaptive`: the scheme and its
    public parameters; `oracle`: also what was drawn in secret this round."""
    observations: int = Field(default=1, ge=1)
    """Rounds at these weights in which an adversary who is not naive sees each victim, with fresh draws each."""
    parameters: Parameters = "public"
    """Whether an adversary who is not naive knows how many slices are noisy and how strong noise is (`public`), or
    estimates both from what it sees; what a defense publishes for the round is known in any case."""
    victims_per_shard: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Victims attacked as one computation; auto: 4, on a GPU 128. Shards run on the workers side by side."""


WITHOUT_EFFECT = ("workers", "gpus_per_worker", "transport")
"""Settings of the runtime that never change a result."""


class RuntimeConfig(Schema):
    """Where the work runs, and in what units; `workers`, `gpus_per_worker`, `transport` never change a result."""

    workers: Literal["auto"] | int = "auto"
    """Worker processes; auto: one a CPU, or `1 / gpus_per_worker` a GPU."""
    clients_per_chunk: Literal["auto"] | int = "auto"
    """Most clients that are one unit of work; auto: a 32nd of the cohort, an eighth where they are trained as one
    computation, at most 16, on a GPU 128. There are as many units as a power of two, so that workers get even
    shares."""
    execution: Literal["auto", "loop", "vectorized", "fused"] = "auto"
    """How the clients of a chunk are trained; auto: by device, model and batch, see `learning/execution.py`."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """How images and filters lie in memory, but for `vectorized`; auto: channels-last for the built-in
    convolutional models on a CPU."""
    precision: Precision = "float32"
    """`bfloat16`: local training computes in it where it can, by the loop: less exact, and faster where the
    processor has instructions for it (docs/engine.md has both figures)."""
    gpus_per_worker: float = Field(default=0.25, gt=0, le=1)
    """Fraction of a GPU that a worker takes where there are GPUs."""
    transport: Literal["auto", "calls"] = "auto"
    """What carries a round between processes; auto: sockets for small models on one node without a GPU (see
    `engine/wires.py`), and Ray's calls elsewhere."""
    deterministic: bool = False
    """Only kernels that give the same bits each time: slower on a GPU, and a model that needs others fails."""

    @model_validator(mode="after")
    def _positive(self) -> "RuntimeConfig":
        for name in ("workers", "clients_per_chunk"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.precision == "bfloat16" and self.execution not in ("auto", "loop"):
            raise ValueError(f"precision: bfloat16 needs execution: loop, not {self.execution}")
        return self


class TrackingConfig(Schema):
    """Where results are logged."""

    uri: str = "auto"
    """MLflow tracking URI; auto: the environment's MLFLOW_TRACKING_URI, or else SQLite, `mlflow.db` in the output
    root. `off` logs nothing."""
    experiment: str = "fedsim"
    """Name of the MLflow experiment."""

    @field_validator("uri", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        # YAML reads a bare `off` as false.
        return "off" if value is False else value


class ExperimentConfig(Schema):
    """One simulation: training under a defense, audited by attacks."""

    name: str = Field(default="simulation", pattern=NAME)
    """Name of the run and of its folder."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Everything random is drawn from it."""
    data: DatasetConfig = DigitsConfig()
    """Data set and how it is split over the clients."""
    model: ModelConfig = LeNetConfig()
    """The network and its initialisation."""
    federation: FederationConfig = FederationConfig()
    """Training."""
    defense: DefenseConfig = NoDefenseConfig()
    """What clients do to their updates and the server to the aggregate."""
    attacks: tuple[AttackConfig, ...] = ()
    """Attacks that audit what clients sent."""
    audit: AuditConfig = AuditConfig()
    """Whom the attacks are tried on."""
    overhead_pairs: int = Field(default=0, ge=0)
    """Pairs of rounds, with and without the defense, that measure its share of the round time after training."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Processes and devices."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Rounds between checkpoints."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "ExperimentConfig":
        labels = [attack.title for attack in self.attacks]
        if len(set(labels)) < len(labels):
            raise ValueError(f"attacks: two share a label ({', '.join(labels)}); give each its own `label`")
        late = [r for r in self.audit.rounds if not 0 <= r <= self.federation.rounds]
        if late and self.attacks:
            last = self.federation.rounds
            raise ValueError(f"audit.rounds: {late[0]} is not between 0 (untrained) and {last} (trained)")
        if self.audit.local_learning_rate == "estimated" and set(self.audit.adversaries) != {"naive"}:
            raise ValueError(
                "audit.adversaries: without the local learning rate only the naive adversary is defined"
            )
        rigid = [attack.title for attack in self.attacks if not attack.takes_strategies]
        if rigid and set(self.audit.adversaries) != {"naive"}:
            raise ValueError(f"audit.adversaries: only the naive adversary can use the attack {rigid[0]}")
        simulating = [attack.title for attack in self.attacks if attack.simulates_defense]
        if simulating and self.audit.parameters == "estimated" and set(self.audit.adversaries) != {"naive"}:
            raise ValueError(f"audit.parameters: {simulating[0]} simulates the defense, which takes `public`")
        if self.federation.local_steps != 1:
            if self.runtime.execution == "fused":
                raise ValueError("runtime.execution: fused is for one local step only (federation.local_steps: 1)")
            if self.defense.needs_one_local_step():
                raise ValueError("defense: it is defined for one local step only (federation.local_steps: 1)")
        return self

    def execution(self, device: torch.device) -> Execution:
        """Return how clients are trained on `device`: as `runtime.execution` says, or by the rule."""
        wanted = self.runtime.execution
        if wanted != "auto":
            return wanted
        if self.runtime.precision == "bfloat16":
            return "loop"
        fused_batch = self.model.fused_batch if self.federation.local_steps == 1 else 0
        return choose_execution(device, self.federation.batch_size, fused_batch)

    def memory_format(self, device: torch.device) -> MemoryFormat:
        """Return how the loop keeps images and filters on `device`: as the config says, or by the rule."""
        wanted = self.runtime.memory_format
        return choose_memory_format(device, self.model.channels_last) if wanted == "auto" else wanted

    def chunk_width(self, cohort: int, device: torch.device) -> int:
        """Return the clients a chunk for a cohort of this size on `device`; it never depends on the workers."""
        wanted = self.runtime.clients_per_chunk
        if isinstance(wanted, int):
            return min(cohort, wanted)
        chunks = min(cohort, 32 if self.execution(device) == "loop" else 8)
        return min(128 if device.type == "cuda" else 16, -(-cohort // power_of_two(chunks)))

    def shard_width(self, device: torch.device) -> int:
        """Return the victims that are attacked as one computation on `device`."""
        wanted = self.audit.victims_per_shard
        if isinstance(wanted, int):
            return wanted
        return 128 if device.type == "cuda" else 4

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved experiment as plain data, as YAML and JSON hold it."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return data

    def fingerprint(self) -> str:
        """Return a digest of all that can change a result: equal digests, equal experiments."""
        data = self.to_dict()
        data.pop("tracking")
        data.pop("checkpoint_every")
        data["runtime"] = {k: v for k, v in data["runtime"].items() if k not in WITHOUT_EFFECT}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def parse_config(data: dict[str, Any], source: str = "config") -> ExperimentConfig:
    """Check plain data, laid over the defaults, and return the experiment.

    Raises:
        ConfigError: With the dotted path of the first wrong setting, what is wrong and what would be valid.
    """
    data = merged(ExperimentConfig().to_dict(), data)
    try:
        return ExperimentConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, data)}") from None


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment from a YAML file (or the defaults) with `key=value` overrides laid upon it."""
    base = {} if path is None else read_yaml(path)
    return parse_config(merged(base, parse_overrides(overrides)), str(path or "config"))
