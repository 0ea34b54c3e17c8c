"""Attack a gradient of your own: make a payload with plain PyTorch, then let `fedsim attack` invert it.

Any training code can write such a file; nothing of fedsim takes part in it. Run both commands in this folder:

    ../.venv/bin/python own_payload.py
    ../.venv/bin/fedsim attack payload.pt --model own_payload:network --shape 1x28x28 --attack dlg name=own-payload
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


def network(shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> nn.Module:
    """Two convolutions and a linear layer; fedsim calls this to learn the architecture."""
    channels, height, width = shape
    return nn.Sequential(
        *(nn.Conv2d(channels, 12, 5, stride=2, padding=2), nn.Sigmoid()),
        *(nn.Conv2d(12, 12, 5, stride=2, padding=2), nn.Sigmoid()),
        *(nn.Flatten(), nn.Linear(12 * -(-height // 4) * -(-width // 4), classes)),
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    digits = load_digits()
    image = torch.tensor(digits.images[:1], dtype=torch.float32)[:, None] / 16
    image = F.interpolate(image, size=(28, 28), mode="bilinear")
    label = torch.tensor(digits.target[:1])
    model = network()
    F.cross_entropy(model(image), label).backward()
    payload = {
        "weights": model.state_dict(),
        "gradient": {name: parameter.grad for name, parameter in model.named_parameters()},
        "labels": label,  # for attacks that are told the labels; dlg is not
        "images": image,  # the truth, for scoring alone; leave it out and there are no scores
    }
    torch.save(payload, "payload.pt")
    print("wrote payload.pt; now run the second command at the top of this file")
