"""An attack of your own: read the image off the last layer's gradient, without any optimisation.

With one image, the weight gradient of a linear layer is (error at its output) × (its input), and the bias
gradient is that error, so one division gives the layer's input exactly (Phong et al., 2018). In a network that
starts with the linear layer, that input is the image.

Run it with `.venv/bin/python examples/own_attack.py`.
"""

import time

import torch
from torch import nn

from fedsim import Attack, ExperimentConfig, Observation, Reconstruction, Simulation


def perceptron(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Two linear layers on the flattened image."""
    pixels = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, classes))


class FirstLayer(Attack):
    """Divide the first layer's weight gradient by its bias gradient."""

    def reconstruct(self, observation: Observation) -> Reconstruction:
        """Invert all victims at once; every victim's gradient comes from one image."""
        start = time.perf_counter()
        gradients = observation.model.layout.views(observation.gradients)
        weight, bias = gradients["1.weight"], gradients["1.bias"]
        strongest = bias.abs().argmax(dim=1)
        rows = torch.arange(observation.victims)
        images = weight[rows, strongest] / bias[rows, strongest, None]
        nothing = torch.zeros(observation.victims)
        return Reconstruction(
            images=images.reshape(observation.victims, 1, *observation.model.shape),
            labels=gradients["3.bias"].argmin(dim=1, keepdim=True),
            loss=nothing,
            iterations=nothing.long(),
            stalled=nothing.bool(),
            exhausted=nothing.bool(),
            seconds=time.perf_counter() - start,
        )


if __name__ == "__main__":
    config = ExperimentConfig(
        name="first-layer",
        model={"name": "custom", "factory": "own_attack:perceptron"},
        federation={"rounds": 5, "clients": 40},
        attacks=[{"name": "custom", "factory": "own_attack:FirstLayer"}],
        audit={"victims": 4},
    )
    result = Simulation(config).run()
    print(result.images[["attack", "victim", "PSNR", "SSIM", "capped"]].to_string(index=False))
