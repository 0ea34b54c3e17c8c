"""The learned inverter on several models and sizes of batches; prints JSON lines.

.venv/bin/python -m benchmarks.inverter --data-dir DIR

Trained on MNIST test images, applied to undefended gradients of training images at untrained weights; images of a
batch are paired with the reconstructions by the Hungarian method. `floor` is the mean public image's PSNR.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from fedsim.attacks.autodiff import Autodiff
from fedsim.attacks.inverter import InverterConfig
from fedsim.attacks.learning import LearningContext
from fedsim.data.datasets import MNISTConfig, load_dataset
from fedsim.learning.batches import ImageStore
from fedsim.learning.models import LeNet4Config, LeNetConfig, MLPConfig, build_model
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import Observation

MODELS = {"lenet": LeNetConfig, "lenet4": LeNet4Config, "mlp": MLPConfig}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--victims", type=int, default=32)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    dataset = load_dataset(MNISTConfig(), options.data_dir)
    private = ImageStore.of(dataset.train_images, dataset.train_labels)
    public = ImageStore.of(dataset.test_images, dataset.test_labels)
    mean = torch.from_numpy(dataset.test_images).float().div(255).mean(0)
    settings = InverterConfig(images=options.images, steps=options.steps)
    for name, batch in ((name, batch) for batch in options.batch for name in options.models):
        began = time.perf_counter()
        model = build_model(MODELS[name](), dataset.shape, dataset.classes, seed=0)
        weights = model.initial_weights()
        order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(1))
        chosen = order[: options.victims * batch].view(options.victims, batch)
        images, labels = private.take(chosen.numpy())
        gradients, _ = Autodiff(model, weights).gradients(images, F.one_hot(labels, dataset.classes).float())
        seeds, empty = tuple(range(options.victims)), gradients.new_zeros(options.victims, 0)
        seen = Observation(model, weights, gradients, batch, empty, None, seeds)
        attack = settings.build()
        trained = attack.learn(LearningContext(model, weights, public, batch, seed=2))
        rows = score(images, attack.taught(trained).reconstruct(seen).images)
        floor = score(images, mean.expand_as(images))
        line = {"model": name, "batch": batch, "images": len(rows), "steps": trained.steps}
        line |= {key: round(sum(getattr(r, key) for r in rows) / len(rows), 3) for key in ("PSNR", "SSIM")}
        line |= {"success": round(sum(r.PSNR > 20 and r.SSIM > 0.5 for r in rows) / len(rows), 3)}
        line |= {"floor": round(sum(r.PSNR for r in floor) / len(rows), 2)}
        print(json.dumps(line | {"seconds": round(time.perf_counter() - began)}), flush=True)


if __name__ == "__main__":
    main()
