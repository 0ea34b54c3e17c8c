import torch

from fedsim.aggregation.plain import PlainAggregation


def test_partials_of_chunks_add_up_to_the_weighted_sum() -> None:
    updates, weights = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), torch.arange(1.0, 8.0)
    aggregation = PlainAggregation()
    left, right = (aggregation.partial(updates[a:b], weights[a:b]) for a, b in ((0, 3), (3, 7)))
    assert torch.allclose(aggregation.add(left, right), (weights[:, None] * updates).sum(0), atol=1e-5)


def test_the_server_sees_each_update_in_the_clear() -> None:
    updates = torch.randn(3, 5)
    assert torch.equal(PlainAggregation().visible(updates), updates)
