import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fedsim.attacks import AttackConfig
from fedsim.attacks.base import Attack
from fedsim.errors import ConfigError
from fedsim.privacy.observation import Reconstruction
from tests.attacks.problems import lenet, observe, victims

HERE = "tests.attacks.test_custom"


class Grey(Attack):
    """Guesses one shade of grey."""

    def __init__(self, shade: float = 0.5) -> None:
        self.shade = shade

    def reconstruct(self, observation):
        count = torch.zeros(observation.victims)
        shape = (observation.victims, observation.batch_size, *observation.model.shape)
        labels = torch.zeros(shape[:2], dtype=torch.long)
        no = count.bool()
        return Reconstruction(torch.full(shape, self.shade), labels, count, count.long(), no, no, 0.0)


def nothing():
    return "not an attack"


def configured(**settings):
    return TypeAdapter(AttackConfig).validate_python({"name": "custom", **settings})


def test_a_class_of_the_users_own_attacks():
    images, labels = victims(2)
    settings = configured(factory=f"{HERE}:Grey", options={"shade": 0.25}, needs_labels=True)
    assert settings.knows_labels
    found = settings.build().reconstruct(observe(lenet(), images, labels))
    assert (found.images == 0.25).all() and found.images.shape == images.shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factory": f"{HERE}:Missing"}, "no attribute 'Missing'"),
        ({"factory": "nowhere.at.all:Attack"}, "cannot import"),
        ({"factory": "Grey"}, "module:attribute"),
        ({"factory": f"{HERE}:HERE"}, "is no class or function"),
        ({"factory": f"{HERE}:Grey", "options": {"colour": 1}}, "does not take them"),
        ({"factory": f"{HERE}:nothing"}, "returned str, not an Attack"),
    ],
)
def test_what_cannot_be_built_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        configured(**settings).build()


@pytest.mark.parametrize("settings", [{"restarts": 3}, {"ignore": ["fc.*"]}])
def test_settings_that_would_be_ignored_are_refused(settings):
    with pytest.raises(ValidationError, match="under `options`"):
        configured(factory=f"{HERE}:Grey", **settings)


def test_a_config_that_names_every_setting_is_read_again():
    """So are those that a run leaves, from which it goes on."""
    own = configured(factory=f"{HERE}:Grey")
    assert TypeAdapter(AttackConfig).validate_python(own.model_dump()) == own


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(
        ValidationError,
        match="'dlg', 'idlg', 'gia', 'gradinversion', 'analytic', 'r_gap', 'inverter', 'generative', 'custom'",
    ):
        TypeAdapter(AttackConfig).validate_python({"name": "dgl"})
