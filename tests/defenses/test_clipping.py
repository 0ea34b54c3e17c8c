import torch

from fedsim.defenses.clipping import clip_slices_, clipped
from tests.defenses.defense_cases import draw


def test_long_rows_get_the_norm_and_short_ones_stay():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(clipped(rows, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_only_selected_slices_are_clipped():
    rows = draw(2, 3, 10) + 1
    selected = torch.tensor([[True, False], [False, True]])
    result = clip_slices_(rows.clone(), [slice(0, 4), slice(4, 10)], selected, 0.5)
    assert torch.equal(result[0, :, 4:], rows[0, :, 4:]) and torch.equal(result[1, :, :4], rows[1, :, :4])
    lengths = torch.stack([result[0, :, :4].norm(dim=1), result[1, :, 4:].norm(dim=1)])
    assert torch.allclose(lengths, torch.full_like(lengths, 0.5))


def test_overlapping_slices_are_clipped_in_turn():
    rows = torch.tensor([[[3.0, 4.0, 0.0]]])
    selected = torch.tensor([[True, True]])
    result = clip_slices_(rows, [slice(0, 2), slice(1, 3)], selected, 1.0)
    # First to (0.6, 0.8); the second slice (0.8, 0) is then short enough.
    assert torch.allclose(result, torch.tensor([[[0.6, 0.8, 0.0]]]))
