"""GIA, provisional."""

import time
from typing import Literal
import torch
from torch.nn import functional as F
from fedsim.attacks.base import Attack, AttackSettings
from fedsim.attacks.gradient_matching import CosineDistance, GradientMatching
from fedsim.privacy.observation import Reconstruction
from fedsim.randomness import Purpose, torch_stream


class GIAConfig(AttackSettings):
    """Inverting gradients (Geiping et al., NeurIPS 2020)."""

    name: Literal["gia"] = "gia"
    iterations: int = 1200
    """Steps."""

    @property
    def knows_labels(self):
        return True

    def build(self):
        return GIA(self)


class GIA(Attack):
    def __init__(self, s):
        self.s = s

    def reconstruct(self, o):
        t = time.perf_counter()
        gm = GradientMatching(o, CosineDistance, self.s.ignore)
        shape = (o.batch_size, *o.model.shape)
        x = torch.stack([torch.rand(shape, generator=torch_stream(s, Purpose.ATTACK, 0)) for s in o.seeds])
        pr = F.one_hot(o.labels, o.model.classes).float()
        who = torch.arange(o.victims)
        opt = torch.optim.Adam([x], lr=0.1)
        best, bx = torch.full((o.victims,), float("inf")), x.clone()
        for i in range(self.s.iterations):
            m = gm(x, pr, who)
            better = m.loss < best
            best = torch.where(better, m.loss, best)
            bx[better] = x[better]
            x.grad = m.by_images.sign()
            for g in opt.param_groups:
                g["lr"] = 0.1 * 0.1 ** sum(i >= f * self.s.iterations for f in (0.375, 0.625, 0.875))
            opt.step()
            x.clamp_(0, 1)
        no = torch.zeros(o.victims, dtype=torch.bool)
        return Reconstruction(
            bx, o.labels, best, torch.full((o.victims,), self.s.iterations), no, no, time.perf_counter() - t
        )
