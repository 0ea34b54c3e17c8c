import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.attacks.priors import total_variation
from tests.attacks.problems import rand


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(2, 6), st.integers(2, 6))
def test_value_and_derivative_agree_with_the_definition(problems, batch, channels, height, width):
    images = rand(problems, batch, channels, height, width, dtype=torch.float64)
    value, derivative = total_variation(images)
    for row, image in enumerate(images):
        x = image.clone().requires_grad_()
        down = (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
        across = (x[..., :, 1:] - x[..., :, :-1]).abs().mean()
        (slope,) = torch.autograd.grad(down + across, x)
        torch.testing.assert_close(value[row], (down + across).detach())
        torch.testing.assert_close(derivative[row], slope)


def test_a_flat_image_has_none_and_noise_has_more_than_a_ramp():
    flat = torch.full((1, 1, 1, 8, 8), 0.3)
    value, derivative = total_variation(flat)
    assert float(value) == 0 and not derivative.any()
    ramp = torch.linspace(0, 1, 8).expand(1, 1, 1, 8, 8)
    assert float(total_variation(ramp)[0]) < float(total_variation(rand(1, 1, 1, 8, 8))[0])


def test_the_images_are_not_changed():
    images = rand(1, 1, 1, 4, 4)
    before = images.clone()
    total_variation(images)
    assert torch.equal(images, before)
