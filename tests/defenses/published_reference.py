"""The published arithmetic of GradDefense, slow and plain: loops, lists and NumPy, written from a description.

Nothing here is shared with `fedsim`; randomness is whatever the caller's `draw(slice, index)` returns.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F


def sensitivity(logits, parameters, images, targets):
    """Dense Jacobian of every gradient entry, summed over the entries of a parameter, then norms a sample."""

    def gradients(x):
        loss = F.cross_entropy(logits(parameters, x), targets)
        return torch.autograd.grad(loss, parameters, create_graph=True)

    result = []
    for index in range(len(parameters)):
        jacobian = torch.autograd.functional.jacobian(lambda x, i=index: gradients(x)[i].reshape(-1), images)
        product = jacobian.numpy().sum(axis=0)
        result.append(sum(np.linalg.norm(sample) for sample in product) / len(product))
    return result


def slice_ends(risk, sizes, slices):
    """First entry 0, then the last index of each slice, as the greedy walk over atoms finds them."""
    atom = sizes[0]
    for size in sizes[1:]:
        while size:
            atom, size = size, atom % size
    weights = []
    for layer, size in zip(risk, sizes, strict=True):
        count = size // atom
        for _ in range(count):
            weights.append(layer / count)
    average = sum(risk) / slices
    ends, first = [0], 0
    for _ in range(slices - 1):
        total = 0
        for position in range(first, len(weights)):
            total += weights[position]
            if not total < average:
                first = position
                ends.append(position * atom - 1)
                break
    ends.append(len(weights) * atom - 1)
    return ends


def perturb(gradient, ends, chosen, draw):
    """Add a draw to every index of the chosen slices, both ends included; index -1 is the last entry."""
    values = [float(value) for value in gradient]
    for number in sorted(chosen):
        for index in range(ends[number], ends[number + 1] + 1):
            values[index] += draw(number, index)
    return np.array(values)


def clip(samples, ends, chosen, norm):
    """Clip the chosen slices of each sample one after the other, and average the samples."""
    samples = np.array(samples, dtype=np.float64)
    for number in sorted(chosen):
        for sample in samples:
            part = sample[ends[number] : ends[number + 1] + 1]
            part /= max(1.0, math.sqrt(sum(value * value for value in part)) / norm)
    return samples.sum(axis=0) / len(samples)


def compensation_scale(clients, perturbed, slices, sigma, client_weights):
    total = 0.0
    for weight in client_weights:
        total += clients * perturbed / slices * sigma**2 * weight
    return math.sqrt(total)


def denoise(vector, scale, aspect):
    vector = np.asarray(vector, dtype=np.float64)
    size = len(vector)
    rows = next(i for i in range(1, size + 1) if size % i == 0 and i >= math.sqrt(aspect * size))
    columns = size // rows
    matrix = vector.reshape(rows, columns)
    values, vectors = np.linalg.eig(np.cov(matrix, rowvar=False))
    edges = [(1 + sign / math.sqrt(rows / columns)) ** 2 * scale**2 for sign in (-1, 1)]
    kept = [i for i in range(len(values)) if not edges[0] < values[i] < edges[1]]
    return (matrix @ vectors[:, kept] @ vectors[:, kept].T).reshape(-1)
