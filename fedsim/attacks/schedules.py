"""Step sizes over the course of a search or a training."""

import math


def warm_cosine(largest: float, step: int, steps: int, warm_up: int) -> float:
    """Return the size of step `step` of `steps`, from 0: it grows over `warm_up` steps and falls along a cosine.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5 (the cosine, without restarts); Goyal et al.,
    "Accurate, Large Minibatch SGD", 2017, section 2.2 (the warm-up).
    """
    return largest * min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
