import numpy as np
import pytest
from PIL import Image

from analysis.partition_figure import MOST_BARS, draw_partition

NAMES = [f"class {number}" for number in range(10)]


def counts(clients: int, classes: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, (clients, classes))


@pytest.mark.parametrize("clients", [1, 2, MOST_BARS, MOST_BARS + 1, 3000])
def test_a_picture_is_written(tmp_path, clients):
    path = tmp_path / "new" / "partition.png"
    draw_partition(counts(clients), NAMES, path)
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape[1] == 1500 and 0.02 < (pixels < 200).mean() < 0.9


@pytest.mark.parametrize("clients", [5, 50])
def test_many_classes_and_empty_clients_can_be_drawn(tmp_path, clients):
    held = counts(clients, 100)
    held[0] = 0
    draw_partition(held, [str(number) for number in range(100)], tmp_path / "partition.png")
    assert (tmp_path / "partition.png").stat().st_size > 10_000


def test_the_picture_shows_the_counts(tmp_path):
    draw_partition(counts(20), NAMES, tmp_path / "a.png")
    draw_partition(counts(20)[:, ::-1], NAMES, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("shape", [(0, 10), (3, 9), (10,)])
def test_counts_that_do_not_fit_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="do not fit 10 class names"):
        draw_partition(np.zeros(shape, np.int64), NAMES, tmp_path / "partition.png")
