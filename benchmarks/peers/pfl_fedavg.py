"""Apple's pfl on its PyTorch backend: `pip install pfl torch`, then run this file; several workers by torchrun."""

import os
import subprocess
import sys

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional as F
from workload import BATCH, CLIENTS, RATE, Clients, LeNet, Watch, arguments

watch = Watch()


class Model(LeNet):
    """The network with the two methods that pfl asks for."""

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss."""
        return F.cross_entropy(self(images), labels)

    def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Weighted]:
        """Return the loss as pfl counts it."""
        return {"loss": Weighted(self.loss(images, labels).item() * len(images), len(images))}


class RoundClock(TrainingProcessCallback):
    """Notes when rounds end."""

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: object, *, central_iteration: int
    ) -> tuple:
        """Note it and go on."""
        watch.round_done()
        return False, Metrics()


def main() -> None:
    """Run the rounds in this process, which may be one of several."""
    options, clients = arguments(), Clients()
    torch.set_num_threads(1)
    np.random.seed(0)
    torch.manual_seed(0)
    network = Model()
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    sampler = get_user_sampler("minimize_reuse", range(CLIENTS))
    data = FederatedDataset(lambda client: Dataset(clients[client], user_id=client), sampler)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=options.rounds,
            evaluation_frequency=options.rounds + 1,
            train_cohort_size=options.clients,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(data, data, [WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=None if options.steps else 1,
            local_num_steps=options.steps or None,
            local_learning_rate=RATE,
            local_batch_size=BATCH,
        ),
        callbacks=[RoundClock()],
        send_metrics_to_platform=False,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        watch.report()


if __name__ == "__main__":
    workers = arguments().workers
    if workers > 1 and "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}"]
        sys.exit(subprocess.run([*launch, *sys.argv]).returncode)
    main()
