"""Attacks: one method a file; the union below is the registry of their names."""

from typing import Annotated

from pydantic import Field

from fedsim.attacks.analytic import AnalyticConfig
from fedsim.attacks.custom import CustomAttackConfig
from fedsim.attacks.dlg import DLGConfig
from fedsim.attacks.generative import GenerativeConfig
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.gradinversion import GradInversionConfig
from fedsim.attacks.idlg import IDLGConfig
from fedsim.attacks.inverter import InverterConfig
from fedsim.attacks.r_gap import RGAPConfig

AttackConfig = Annotated[
    DLGConfig
    | IDLGConfig
    | GIAConfig
    | GradInversionConfig
    | AnalyticConfig
    | RGAPConfig
    | InverterConfig
    | GenerativeConfig
    | CustomAttackConfig,
    Field(discriminator="name"),
]
