"""The sparse products that the graph methods share, against dense matrices."""

import pytest
import torch
from torch import Tensor

import zoo.nn.graph
from zoo.nn.graph import Adjacency, Sparse


def dense(edges: Tensor, n: int) -> Tensor:
    a = torch.zeros(n, n, dtype=torch.float64)
    for source, target in edges.t().tolist():
        if source != target:
            a[target, source] += 1
    a += torch.eye(n, dtype=torch.float64)
    scale = a.sum(1).rsqrt()
    return scale[:, None] * a * scale


def entries(symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = torch.tensor([[0, 0, 1, 3, 0], [1, 2, 2, 0, 1]])  # (0, 1) twice
    values = torch.tensor([1.0, 2.0, -1.0, 0.5, 4.0], dtype=torch.float64)
    if symmetric:
        return torch.cat((rows, columns)), torch.cat((columns, rows)), values.repeat(2)
    return rows, columns, values


@pytest.mark.parametrize("shape", [(4, 4), (4, 3), (4, 9)])
def test_sparse_products_and_their_gradients(shape: tuple[int, int]) -> None:
    rows, columns, values = entries(False)
    matrix, a = Sparse(rows, columns, values, shape), torch.zeros(shape, dtype=torch.float64)
    a.index_put_((rows, columns), values, accumulate=True)
    x = torch.randn(shape[1], 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, shape[0], dtype=torch.float64).t().requires_grad_()  # not contiguous
    assert torch.allclose(matrix @ x, a @ x) and torch.allclose(matrix.t() @ y, a.t() @ y)
    assert matrix.t().shape == shape[::-1] and matrix.t().there is matrix.back
    for product, given in ((lambda t: matrix @ t, x), (lambda t: matrix.t() @ t, y)):
        assert torch.autograd.gradcheck(product, (given,)) and torch.autograd.gradgradcheck(product, (given,))


def test_a_symmetric_matrix_is_held_once() -> None:
    assert (matrix := Sparse(*entries(True), (4, 4))).there is matrix.back
    assert (matrix := Sparse(*entries(False), (4, 4))).there is not matrix.back
    assert (matrix := Sparse(*entries(True), (4, 5))).there is not matrix.back  # its entries lie symmetrically, but
    assert matrix.there.shape == (4, 5) and matrix.back.shape == (5, 4)


def test_products_stay_exact_under_autocast() -> None:
    rows, columns, values = entries(False)
    matrix = Sparse(rows, columns, values.float(), (4, 3))
    x = torch.randn(3, 5, requires_grad=True)
    expected = matrix @ x
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        found = matrix @ x
        assert torch.equal(torch.autograd.grad(found.sum(), x)[0], gradient)
        assert (matrix @ x.bfloat16()).dtype == torch.float32
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("directed", [False, True])
def test_adjacency_and_back(directed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    edges = torch.tensor([[0, 0, 1, 3, 2, 0], [1, 2, 2, 0, 2, 1]])  # a loop at 2, an edge twice, 4 isolated
    edges = edges if directed else torch.cat((edges, edges.flip(0)), 1)
    adjacency, a = Adjacency(edges, 5, torch.float64), dense(edges, 5)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(adjacency @ x, a @ x) and torch.allclose(adjacency.back(x), a.T @ x)
    assert torch.autograd.gradcheck(adjacency.__matmul__, (x,)) and torch.autograd.gradcheck(adjacency.back, (x,))
    held = adjacency._sparse
    assert held is not None and (held.there is held.back) is not directed
    monkeypatch.setattr(zoo.nn.graph, "tracing", lambda _: True)  # the form that is exported
    assert torch.allclose(adjacency @ x, a @ x) and torch.allclose(adjacency.back(x), a.T @ x)


def test_a_product_of_evaluation_serves_training() -> None:
    adjacency, x = Adjacency(torch.tensor([[0], [1]]), 2), torch.randn(2, 2)
    with torch.inference_mode():
        adjacency @ x
    weight = torch.nn.Parameter(torch.randn(2, 2))
    (adjacency @ (x @ weight)).sum().backward()
    assert weight.grad is not None
