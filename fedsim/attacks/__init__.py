"""Attacks: one method a file; the union below is the registry of their names."""

from typing import Annotated

from pydantic import Field

from fedsim.attacks.dlg import DLGConfig
from fedsim.attacks.gia import GIAConfig

AttackConfig = Annotated[DLGConfig | GIAConfig, Field(discriminator="name")]
