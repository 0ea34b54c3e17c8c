import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.learning import batch_norm
from fedsim.learning.models import ConvNet64Config, CustomModelConfig, LeNetConfig, Model, ModelConfig, build_model

SHAPES = {"grey": (1, 28, 28), "colour": (3, 32, 32)}


@pytest.mark.parametrize(
    ("name", "kind", "dimension"),
    [
        ("lenet", "grey", 13_426),
        ("lenet", "colour", 15_826),
        ("lenet4", "grey", 17_038),
        ("lenet4", "colour", 19_438),
        ("convnet64", "colour", 2_904_970),
    ],
)
def test_parameter_counts_are_those_of_the_papers(name: str, kind: str, dimension: int) -> None:
    model = build_model(TypeAdapter(ModelConfig).validate_python({"name": name}), SHAPES[kind], 10, seed=0)
    assert model.layout.dimension == dimension


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_model(LeNetConfig(), SHAPES["grey"], 10, seed=3).initial_weights()
    torch.manual_seed(2)
    again = build_model(LeNetConfig(), SHAPES["grey"], 10, seed=3).initial_weights()
    other = build_model(LeNetConfig(), SHAPES["grey"], 10, seed=4).initial_weights()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(LeNetConfig(), SHAPES["grey"], 10, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_uniform_initialisation_fills_the_published_range() -> None:
    weights = build_model(LeNetConfig(init="uniform"), SHAPES["grey"], 10, seed=0).initial_weights()
    assert weights.abs().max() <= 0.5
    assert abs(weights.std().item() - 1 / 12**0.5) < 0.01


def test_functional_logits_equal_the_modules() -> None:
    model = build_model(LeNetConfig(), SHAPES["grey"], 10, seed=0)
    images = torch.rand(4, 1, 28, 28)
    assert torch.equal(model.logits(model.initial_weights(), images), model.module(images))


def test_representation_is_the_input_of_the_first_linear_layer() -> None:
    model = build_model(LeNetConfig(), SHAPES["grey"], 10, seed=0)
    weights, images = model.initial_weights(), torch.rand(4, 1, 28, 28)
    features = model.representation(weights, images)
    linear = model.module.get_submodule(model.first_linear)
    assert features.shape == (4, 588)
    assert torch.allclose(linear(features), model.logits(weights, images))


def conv_net_without_pooling(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(shape[0], 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes)
    )


def wrong_factory(shape: tuple[int, int, int], classes: int) -> str:
    return "not a module"


def test_batch_norm_of_a_users_model_is_replaced_and_agrees_with_pytorch() -> None:
    reference = nn.BatchNorm2d(3)
    with torch.no_grad():
        reference.weight.uniform_(0.5, 2)
        reference.bias.uniform_(-1, 1)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), reference)
    images = torch.rand(5, 1, 8, 8)
    expected = module.train()(images)
    model = Model(module, (1, 8, 8), 10)
    assert torch.allclose(model.module.train()(images), expected, atol=1e-5)
    statistics = batch_norm.collect_statistics(batch_norm.layers(model.module), images)
    before = module[0](images)
    assert torch.allclose(statistics[:3], before.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(statistics[3:], before.var((0, 2, 3), correction=0), atol=1e-6)


def test_evaluation_uses_the_loaded_averages() -> None:
    layer = batch_norm.FederatedBatchNorm2d(2)
    batch_norm.load_averages(layer, torch.tensor([1.0, 2.0, 4.0, 9.0]))
    images = torch.rand(3, 2, 4, 4)
    expected = (images - torch.tensor([1.0, 2.0])[:, None, None]) / torch.tensor([2.0, 3.0])[:, None, None]
    assert torch.allclose(layer.eval()(images), expected, atol=1e-4)


def test_statistics_are_those_that_training_reports_and_there_in_eval_mode_too() -> None:
    model = Model(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), (2, 8, 8), 3)
    images = torch.rand(4, 2, 8, 8)
    _, expected = model.logits_and_statistics(model.initial_weights(), images)
    torch.testing.assert_close(model.statistics(model.initial_weights(), images), expected)
    model.module.eval()
    batch_norm.load_averages(model.module, expected)
    torch.testing.assert_close(model.statistics(model.initial_weights(), images), expected)
    assert not any(layer._forward_pre_hooks for layer in batch_norm.layers(model.module))


def test_batched_gradients_with_batch_norm_equal_single_ones() -> None:
    model = build_model(ConvNet64Config(), (1, 28, 28), 10, seed=0)
    weights = model.initial_weights()
    images, labels = torch.rand(2, 3, 1, 28, 28), torch.randint(0, 10, (2, 3))

    def loss(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(at, x), y)

    batched = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images, labels)
    for row in range(2):
        single = grad(loss)(weights, images[row], labels[row])
        assert (batched[row] - single).norm() < 1e-4 * single.norm()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CustomModelConfig(factory="no_such_module:f"), "cannot import"),
        (CustomModelConfig(factory="fedsim.learning.models"), "module:attribute"),
        (CustomModelConfig(factory="tests.learning.test_models:missing"), "no attribute"),
        (CustomModelConfig(factory="tests.learning.test_models:wrong_factory"), "not a Module"),
        (ConvNet64Config(), "does not take images"),
    ],
)
def test_models_that_cannot_be_built_say_why(config: CustomModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config, (1, 8, 8), 10, seed=0)
