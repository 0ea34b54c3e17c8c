"""What an attack is: one function from what the server saw to images."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from fedsim.attacks.distances import Distance, Targets
from fedsim.data.public import PublicSource
from fedsim.errors import ConfigError
from fedsim.learning.models import Model
from fedsim.privacy.observation import Adversary, Observation, Reconstruction
from fedsim.schema import Schema

if TYPE_CHECKING:
    from fedsim.attacks.learning import LearningContext

LabelSource = Literal["known", "recovered"]
"""How an attacker that does not search for labels gets them: given, or from the last layer's gradient."""


class Attack:
    """An attack on all victims of an observation at once."""

    def reconstruct(self, observation: Observation) -> Reconstruction:
        """Return one reconstruction a victim.

        Raises:
            ConfigError: If the observation lacks what the attack needs.
        """
        raise NotImplementedError

    def matching_loss(self, observation: Observation, images: Tensor, labels: Tensor) -> Tensor | None:
        """Return the loss of given images, shape [N], as `Reconstruction.loss` measures it; None if it has none.

        The audit asks for it at the private images: an attack that ended above the loss of the truth failed at
        optimising, whatever the defense did.

        Args:
            observation: What the server saw.
            images: Images, shape [N, B, C, H, W].
            labels: Their labels, shape [N, B].
        """
        return None

    def learn(self, context: "LearningContext") -> Any:
        """Return what the attack learns from public images before it sees a victim; None if it learns nothing.

        It is called once for all victims of a round. What it returns depends on nothing but `context`, and goes to
        the workers as it is.

        Raises:
            ConfigError: If the public images do not suffice.
        """
        return None

    def report(self, learned: Any) -> str:
        """Return a line on what `learn` returned, or "" if there is nothing to say."""
        return ""

    def taught(self, learned: Any) -> "Attack":
        """Return this attack with what `learn` returned."""
        return self

    def matching(self, distance: Callable[[Targets], Distance]) -> "Attack":
        """Return this attack with another distance between gradients in place of its own.

        Raises:
            ConfigError: If the attack matches no gradients.
        """
        raise ConfigError(f"{type(self).__name__} matches no gradients; only the naive adversary can use it")


class AttackSettings(Schema):
    """Base of the settings of an attack: `build` makes the attack itself."""

    label: str | None = None
    """Name in results and tables; the attack's own name when not given."""
    restarts: int = Field(default=1, ge=1)
    """Independent random starts a victim; the one with the lowest matching loss counts."""
    ignore: tuple[str, ...] = ()
    """Parameters left out of the matching, as shell patterns: `["fc.*"]` mutes the layer that PLD defends."""

    @property
    def title(self) -> str:
        """What results and tables call this attack."""
        return self.label or str(getattr(self, "name", "attack"))

    @property
    def knows_labels(self) -> bool:
        """Whether the audit hands the victims' labels to the attack."""
        return False

    @property
    def takes_strategies(self) -> bool:
        """Whether adversaries who know the defense can use the attack: it weighs entries, and takes a distance."""
        return True

    @property
    def public_source(self) -> PublicSource | None:
        """Where the images come from that the attack learns from; None: it learns nothing."""
        return None

    @property
    def simulates_defense(self) -> bool:
        """Whether it learns through the defense that the adversary knows, and so needs its parameters."""
        return False

    @property
    def rehearses(self) -> bool:
        """Whether it learns for each strategy by itself, by trying the strategy on public images."""
        return False

    def learns_through_defense(self, adversary: Adversary) -> bool:
        """Return whether what it learns depends on the defense."""
        return self.simulates_defense and adversary != "naive"

    def own_strategies(self, adversary: Adversary) -> tuple[str, ...] | None:
        """Return what an adversary who knows the defense does with this attack; None: what the defense names."""
        return None

    def check(self, model: Model, batch_size: int) -> None:
        """See that the attack applies, before any work starts.

        Args:
            model: The architecture.
            batch_size: Number of images behind each gradient.

        Raises:
            ConfigError: If it does not.
        """

    def check_public(self, count: int, batch_size: int) -> None:
        """See that there are enough public images to learn from, before any work starts.

        Args:
            count: Number of public images.
            batch_size: Number of images behind each gradient.

        Raises:
            ConfigError: If there are not.
        """

    def check_unknown_rate(self) -> None:
        """See that the attack can do without the local learning rate, before any work starts.

        Raises:
            ConfigError: If it cannot.
        """

    def build(self) -> Attack:
        """Return the attack."""
        raise NotImplementedError


class ClosedFormSettings(AttackSettings):
    """Settings of an attack that searches for nothing: it has no restarts, and matches no gradients."""

    @model_validator(mode="after")
    def _nothing_to_repeat(self) -> Self:
        for name in ("restarts", "ignore"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: a closed form has no use for it")
        return self

    @property
    def takes_strategies(self) -> bool:
        """A closed form matches nothing."""
        return False
