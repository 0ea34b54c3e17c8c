import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fedsim.defenses import DefenseConfig
from fedsim.defenses.base import Defense, ServerContext
from fedsim.errors import ConfigError
from tests.defenses.defense_cases import client_context, draw, public_context, tiny_model

ADAPTER = TypeAdapter(DefenseConfig)
NAMES = ["none", "graddefense", "gc", "dp_gaussian", "dp_laplacian", "pld"]


class Halving(Defense):
    """A user's defense: `custom` below names it."""

    def __init__(self, factor=0.5):
        self.factor = factor

    def protect(self, updates, context):
        return updates * self.factor


def not_a_defense():
    return 3


def custom(**settings):
    return ADAPTER.validate_python({"name": "custom", "factory": f"{__name__}:Halving"} | settings)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_defense_does_a_round(name, batch_norm):
    model = tiny_model(batch_norm)
    defense = ADAPTER.validate_python({"name": name}).build()
    updates = draw(4, model.layout.dimension)
    public = defense.prepare(public_context(model))
    protected = defense.protect(updates, client_context(model, public=public))
    server = ServerContext(model, torch.full((4,), 0.25), round=0, public=public)
    aggregate = defense.compensate(protected.mean(0), server)
    assert protected.shape == updates.shape and aggregate.shape == updates.shape[1:]
    assert torch.isfinite(aggregate).all()
    assert defense.upload_bytes(protected).shape == (4,)
    assert torch.equal(protected, updates) == (name == "none")


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValidationError, match="graddefense"):
        ADAPTER.validate_python({"name": "gradefense"})
    with pytest.raises(ValidationError, match="sigma"):
        ADAPTER.validate_python({"name": "gc", "sigma": 1})


def test_a_defense_of_ones_own():
    updates = draw(4, tiny_model().layout.dimension)
    protected = custom(options={"factor": 0.25}).build().protect(updates, client_context(tiny_model()))
    assert torch.equal(protected, updates / 4)
    assert custom(one_local_step=True).needs_one_local_step() and not custom().needs_one_local_step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"options": {"strength": 1}},
            "Halving does not take them: got an unexpected keyword argument 'strength'",
        ),
        ({"factory": f"{__name__}:not_a_defense"}, "returned int, not a Defense"),
        ({"factory": f"{__name__}:NAMES"}, "is no class or function"),
        ({"factory": f"{__name__}:Missing"}, "has no attribute 'Missing'"),
        ({"factory": "nowhere_at_all:Halving"}, "cannot import 'nowhere_at_all'"),
    ],
)
def test_a_bad_factory_is_told(settings, message):
    with pytest.raises(ConfigError, match=message):
        custom(**settings).build()
