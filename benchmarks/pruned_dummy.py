"""Four ways to use what gradient compression has pruned, and the weight of the prior; prints JSON lines.

.venv/bin/python -m benchmarks.pruned_dummy --data-dir DIR

GIA on test images behind an untrained LeNet. `survivors` leaves out what was pruned, `pruned` counts by how far
the dummy exceeds what was; `top-k` prunes the dummy's own gradient to as many entries, and takes the derivative as
if nothing had been pruned (straight through) or of what is kept (masked).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.closed_forms import observe
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.strategies import apply
from fedsim.data.datasets import CIFAR10Config, MNISTConfig, load_dataset
from fedsim.defenses.base import ClientContext
from fedsim.defenses.gc import GradientCompressionConfig
from fedsim.learning.models import LeNetConfig, build_model
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import Knowledge, Observation

DATASETS: dict[str, type[MNISTConfig | CIFAR10Config]] = {"mnist": MNISTConfig, "cifar10": CIFAR10Config}


@dataclass(frozen=True)
class TopK:
    """Prunes each parameter of a dummy's gradient to its largest entries, `kept` [N, L] of them."""

    kept: Tensor
    sizes: tuple[int, ...]
    straight: bool
    by_sample: bool = False

    def __call__(self, gradients: Tensor, victims: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """See `fedsim.attacks.transformations.Transformation`."""
        masks = []
        for part, kept in zip(gradients.abs().split(self.sizes, 1), self.kept[victims].T, strict=True):
            lowest = (part.shape[1] - kept).clamp(max=part.shape[1] - 1)
            masks.append(part >= part.sort(1).values.gather(1, lowest[:, None]))
        mask = torch.cat(masks, 1)
        return gradients * mask, lambda by_seen: by_seen if self.straight else by_seen * mask


def compressed(observation: Observation, labels: Tensor, prune: float) -> Observation:
    """Return what is seen of the victims when their clients prune."""
    settings, model, weights = GradientCompressionConfig(prune=prune), observation.model, observation.weights
    sent = settings.build().protect(observation.gradients, ClientContext(model, weights, [], []))
    assert isinstance(sent, Tensor)
    knowledge = Knowledge(settings, {}, {}, sent[:, None][:, :0])
    return replace(observation, gradients=sent, labels=labels, knowledge=knowledge)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--victims", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--prune", type=float, nargs="+", default=[0.9])
    parser.add_argument("--tv", type=float, nargs="+", default=[3.0, 30.0])
    options = parser.parse_args()
    for name in options.datasets:
        dataset = load_dataset(DATASETS[name](), options.data_dir)
        model = build_model(LeNetConfig(), dataset.shape, dataset.classes, seed=0)
        images, labels, clean = observe(dataset, model, options.victims, 1)
        for prune, tv in ((prune, tv) for prune in options.prune for tv in options.tv):
            seen = compressed(clean, labels, prune)
            sizes = tuple(model.layout.sizes)
            kept = torch.stack([(part != 0).sum(1) for part in seen.gradients.split(sizes, 1)], 1)
            attack = GIAConfig(iterations=options.iterations, tv=tv).build()
            ways = {way: apply(way, seen, attack) for way in ("survivors", "pruned")}
            for straight, way in ((True, "top-k, straight through"), (False, "top-k, masked")):
                ways[way] = replace(seen, transformation=TopK(kept, sizes, straight))
            for way, observation in ways.items():
                rows = score(images, attack.reconstruct(observation).images)
                mean = round(sum(row.PSNR for row in rows) / len(rows), 2)
                least = round(min(row.PSNR for row in rows), 2)
                line = {"dataset": name, "prune": prune, "tv": tv, "way": way, "PSNR": mean, "least": least}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
