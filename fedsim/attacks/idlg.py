"""Improved DLG: the label follows from a sign, so that only the image is searched."""

from typing import Literal

from torch import Tensor

from fedsim.attacks.base import Attack
from fedsim.attacks.dlg import DLG, LBFGSAttackSettings
from fedsim.attacks.labels import last_linear, one_image, sign_rule
from fedsim.learning.models import Model
from fedsim.privacy.observation import Observation


class IDLGConfig(LBFGSAttackSettings):
    """Improved DLG (Zhao et al., 2020): the label from the last layer's gradient, then the image; batch size 1."""

    name: Literal["idlg"] = "idlg"

    def check(self, model: Model, batch_size: int) -> None:
        """See `AttackSettings.check`: one image, and a model that ends in a linear layer."""
        one_image(batch_size)
        last_linear(model)

    def build(self) -> Attack:
        """Return the attack."""
        return IDLG(self)


class IDLG(DLG):
    """DLG with the label that the sign rule finds, even where `ignore` keeps that layer out of the matching.

    Source: Zhao et al., "iDLG: Improved Deep Leakage from Gradients", 2020.
    """

    def labels(self, observation: Observation) -> Tensor:
        """Return the recovered labels [N, 1].

        Raises:
            ConfigError: If gradients come from several images.
        """
        return sign_rule(observation)
