"""DLG, provisional."""
import time
from typing import Literal
import torch
from fedsim.attacks.base import Attack, AttackSettings
from fedsim.attacks.gradient_matching import GradientMatching, SquaredError
from fedsim.attacks.lbfgs import LBFGS, minimise
from fedsim.privacy.observation import Reconstruction
from fedsim.randomness import Purpose, torch_stream


class DLGConfig(AttackSettings):
    """Deep leakage from gradients (Zhu et al., NeurIPS 2019)."""

    name: Literal["dlg"] = "dlg"
    iterations: int = 600
    """Steps."""

    def build(self):
        return DLG(self)


class DLG(Attack):
    def __init__(self, s):
        self.s = s

    def reconstruct(self, o):
        t = time.perf_counter()
        gm = GradientMatching(o, SquaredError, self.s.ignore)
        shape = (o.batch_size, *o.model.shape)
        n = int(torch.tensor(shape).prod())
        c = o.model.classes * o.batch_size

        def start(i):
            g = torch_stream(o.seeds[i], Purpose.ATTACK, 0)
            return torch.cat([0.5 + 0.1 * torch.randn(n, generator=g), 0.1 * torch.randn(c, generator=g)])

        x = torch.stack([start(i) for i in range(o.victims)])

        def obj(v, p):
            im = v[:, :n].view(-1, *shape)
            pr = v[:, n:].view(-1, o.batch_size, o.model.classes).softmax(-1)
            m = gm(im, pr, p)
            dl = pr * (m.by_probabilities - (pr * m.by_probabilities).sum(-1, keepdim=True))
            return m.loss, torch.cat([m.by_images.flatten(1), dl.flatten(1)], 1)

        r = minimise(obj, x, LBFGS(self.s.iterations, loss_tolerance=1e-10))
        return Reconstruction(
            r.x[:, :n].view(-1, *shape), r.x[:, n:].view(-1, o.batch_size, o.model.classes).argmax(-1),
            r.loss, r.iterations, r.stalled, r.exhausted, time.perf_counter() - t,
        )
