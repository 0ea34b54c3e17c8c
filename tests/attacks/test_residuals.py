import torch
from scipy.fft import dctn

from fedsim.attacks.residuals import LEAST_VARIANCE, Residuals, inverse, transform
from tests.attacks.problems import generator, rand


def test_the_transform_is_the_cosine_transform_and_turns_back() -> None:
    images = rand(3, 2, 8, 6)
    expected = dctn(images.numpy(), axes=(-2, -1), norm="ortho")
    torch.testing.assert_close(transform(images), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inverse(transform(images)), images)


def test_variances_of_frequencies_are_measured() -> None:
    expected = rand(6, 6, seed=2) + 0.01
    coefficients = expected.sqrt() * torch.randn(2000, 3, 6, 6, generator=generator(1))
    measured = Residuals.of(inverse(coefficients)).variances
    torch.testing.assert_close(measured, expected, rtol=0.1, atol=0)


def test_few_images_make_nothing_certain() -> None:
    flat = torch.full((1, 1, 4, 4), 0.5)
    variances = Residuals.of(flat).variances
    # One coefficient of 2, squared 4, of 16: beside it a white image of mean square 1/4 counts.
    assert variances.min() == 0.25 / 2 and variances[0, 0] == (4 + 0.25) / 2
    assert (Residuals.of(0 * flat).variances == LEAST_VARIANCE).all()


def test_the_penalty_is_that_of_a_gaussian_and_its_slope_the_derivative() -> None:
    residuals = Residuals(rand(5, 5, seed=3) + 0.1)
    differences = (rand(4, 2, 1, 5, 5, seed=4) - 0.5).double().requires_grad_()
    value, slope = residuals.penalty(differences)
    (expected,) = torch.autograd.grad(value.sum() / 2, differences)
    torch.testing.assert_close(slope, expected)
    drawn = inverse(residuals.variances.sqrt() * torch.randn(500, 1, 3, 5, 5, generator=generator(5)))
    assert abs(float(residuals.penalty(drawn)[0].mean()) / 75 - 1) < 0.02, "about the number of pixels"
