"""Replies folded by edge servers: the same as at once, and the page's arithmetic by hand."""

import pytest
import torch

from fedlora.runs import hierarchy
from fedlora.runs.hierarchy import LINK, Cost, flat, tree


@pytest.mark.parametrize("edges", [1, 3, 7, 20])
def test_products_folded_by_edge_servers_are_the_dense_mean(edges: int) -> None:
    draw = torch.Generator().manual_seed(1)
    terms = []
    for k in range(11):
        rank = 1 + k % 4
        B, A = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((6, rank), (rank, 9)))
        terms.append((1.0 + k, 16 / rank, B, A))
    dense = sum(w * s * B @ A for w, s, B, A in terms) / sum(w for w, *_ in terms)
    assert torch.allclose(hierarchy.fold_stacks(terms, edges), dense, rtol=0, atol=1e-12)


def test_bytes_and_seconds_by_hand() -> None:
    """Twelve replies of a gigabyte, three seconds each; a folded message is two gigabytes and takes four."""
    cost = Cost(10**9, lambda n: 2 * 10**9, 3.0, 4.0, 0.0)
    link = 10**9 / LINK
    assert flat(cost, 12).root == 12e9 and flat(cost, 12).seconds == pytest.approx(12 * (link + 3))
    found = tree(cost, 3, 12)
    assert found.root == 6e9 and found.seconds == pytest.approx(4 * (link + 3) + 3 * (2 * link + 4))
    assert tree(cost, 5, 12).seconds == pytest.approx(3 * (link + 3) + 5 * (2 * link + 4))  # the fullest has three


def test_the_page_and_its_picture_say_what_was_measured() -> None:
    cost = Cost(5 * 10**6, lambda n: 5 * 10**6, 0.006, 0.006, 1e-7)
    text = hierarchy.page({"fedit": cost})
    assert "| `fedit` | 5.00 | 5.00 | 6.0 | 5.00 | 2.8 | 1,000 | 5.00 | 20 | 1e-07 |" in text
    assert (
        hierarchy.picture({"fedit": cost}).finding
        == "A thousand edge servers turn 2.8 hours of FedIT's million replies into 20 seconds"
    )
