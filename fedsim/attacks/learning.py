"""What an attack may learn from before it sees a victim: public images, and the gradients that they would give."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.attacks.autodiff import Autodiff
from fedsim.attacks.chain import chain_of
from fedsim.defenses.base import ClientBatch, ClientContext
from fedsim.learning.batches import ImageStore
from fedsim.learning.models import Model
from fedsim.privacy.observation import ONE_STEP, Knowledge, LocalTraining
from fedsim.randomness import Purpose, torch_stream

PIECE_BYTES = 32 * 2**20
"""Gradients are made in pieces of about this size."""


@dataclass(frozen=True)
class LearningContext:
    """What is at hand when an attack learns: nothing of any client.

    Attributes:
        model: The architecture.
        weights: Global weights that the victims start from, shape [d].
        public: Images that no client holds, and their labels.
        batch_size: Number of images B behind each victim's gradient.
        seed: Seed of whatever is drawn.
        knowledge: The defense and what it published, without secrets and repeats; None for the naive adversary.
        rounds: Rounds at these weights in which the attack will see each victim.
        local: The local training behind each gradient.
        strategy: What the adversary will make of what it sees; "" is the plain attack.
    """

    model: Model
    weights: Tensor
    public: ImageStore
    batch_size: int
    seed: int
    knowledge: Knowledge | None = None
    rounds: int = 1
    local: LocalTraining = ONE_STEP
    strategy: str = ""

    @property
    def size(self) -> int:
        """Number of public images."""
        return len(self.public.labels)

    @property
    def draws_differ(self) -> bool:
        """Whether the same images give another gradient each time they are protected."""
        return self.knowledge is not None

    def generator(self, *counters: int) -> torch.Generator:
        """Return a random stream of its own for each purpose that `counters` name."""
        return torch_stream(self.seed, Purpose.LEARNING, *counters, device=self.weights.device)

    def batches(self, images: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` batches [count, B] out of the indices `images`, each image as often as any other.

        An image comes twice in a batch only where there are fewer images than B, or where a shuffle ends in it.
        """
        wanted = count * self.batch_size
        shuffles = -(-wanted // len(images))
        orders = [
            torch.randperm(len(images), generator=generator, device=generator.device) for _ in range(shuffles)
        ]
        return images[torch.cat(orders)[:wanted].to(images.device)].view(count, self.batch_size)

    def take(self, batches: Tensor) -> tuple[Tensor, Tensor]:
        """Return images [n, B, C, H, W] in [0, 1] and labels [n, B] of batches of indices [n, B]."""
        return self.public.take(batches.cpu().numpy())

    def pieces(self, batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches [m, B] and their gradients [m, d], undefended, piece by piece."""
        weights = self.weights
        chain = chain_of(self.model, weights) if self.local.steps == 1 else None
        engine = chain or Autodiff(self.model, weights, self.local)
        one = weights.numel() * weights.element_size() * self.batch_size
        for piece in batches.split(max(1, PIECE_BYTES // one)):
            images, labels = self.take(piece)
            probabilities = F.one_hot(labels, self.model.classes).to(weights)
            yield piece, engine.gradients(images, probabilities)[0]

    def observed(self, batches: Tensor, gradients: Tensor, generator: torch.Generator) -> Tensor:
        """Return what the server would see of batches [m, B] with `gradients` [m, d], with fresh draws.

        The naive adversary knows of no defense; others protect as clients do, `rounds` times, and average.
        """
        if self.knowledge is None:
            return gradients
        clients = self.clients(batches, [generator] * len(batches))
        total = torch.zeros_like(gradients)
        for _ in range(self.rounds):
            total += self.protected(gradients, clients)
        return total.div_(self.rounds).detach()

    def clients(self, batches: Tensor, generators: Sequence[torch.Generator]) -> ClientContext:
        """Return what clients with batches [m, B] have when they protect their gradients, a generator each."""
        images, labels = self.take(batches.chunk(self.local.steps, 1)[0])
        rows = torch.arange(len(batches), device=self.weights.device)
        return ClientContext(
            model=self.model,
            weights=self.weights,
            batches=[ClientBatch(rows, images, labels)],
            generators=generators,
            public=self.knowledge.public if self.knowledge else {},
            local_steps=self.local.steps,
        )

    def protected(self, gradients: Tensor, clients: ClientContext) -> Tensor:
        """Return gradients [m, d] as the clients would send them: protected by the defense that is known, once."""
        if self.knowledge is None:
            return gradients
        sent = self.knowledge.defense.build().protect(gradients, clients)
        return (sent if isinstance(sent, Tensor) else torch.stack(list(sent))).detach()
