import pytest
import torch
from torch import nn

from mlsbi import CNNEmbedding, MLPEmbedding, SetEmbedding
from mlsbi.density.embeddings import (
    embedding_from_config,
    embedding_to_config,
    resolve_embedding,
    shared_axes,
)
from mlsbi.randomness import seeded

CASES = [
    (MLPEmbedding(features=5), (7,)), (MLPEmbedding(features=5), (3, 4)), (SetEmbedding(features=5), (20,)),
    (SetEmbedding(features=5), (20, 3)), (CNNEmbedding(features=5), (64,)), (CNNEmbedding(features=5), (33, 20)),
    (CNNEmbedding(features=5), (3, 16, 16)), (CNNEmbedding(features=5, dimensions=1), (2, 50)),
    (CNNEmbedding(features=5, channels=(4,), kernel=3, grid=1), (5, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("builder", "shape"), CASES, ids=str)
def test_vectors_come_out_and_gradients_go_in(builder, shape):
    with seeded(0):
        network, x = builder(shape), torch.randn(6, *shape)
    out = network(x)
    assert out.shape == (6, 5)
    assert torch.allclose(network(x[2:4]), out[2:4], atol=1e-5)  # rows do not see each other
    out.square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in network.parameters())
    assert embedding_from_config(embedding_to_config(builder)) == builder


def test_sets_have_no_order_and_other_embeddings_have():
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    for builder, same in ((SetEmbedding(), True), (MLPEmbedding(), False), (CNNEmbedding(), False)):
        with seeded(1):
            network = builder((30,))
        assert torch.allclose(network(x), network(x[:, torch.randperm(30)]), atol=1e-5) == same


def test_exchangeable_axes():
    assert shared_axes(SetEmbedding(), (20, 3)) == (0,)
    assert shared_axes(MLPEmbedding(), (20, 3)) == ()
    assert shared_axes(CNNEmbedding(), (3, 16, 16)) == (1, 2)
    assert shared_axes(CNNEmbedding(), (16, 16)) == (0, 1)
    assert shared_axes(CNNEmbedding(), (16,)) == (0,)
    assert shared_axes(resolve_embedding(nn.Flatten()), (20, 3)) == ()
    assert shared_axes(None, (20, 3)) == ()


def test_what_can_be_an_embedding():
    assert resolve_embedding(None) is None
    assert resolve_embedding("set") == SetEmbedding()
    given = nn.Linear(3, 2)
    copy = resolve_embedding(given)((3,))
    assert copy is not given
    assert torch.equal(copy.weight, given.weight)
    assert embedding_to_config(resolve_embedding(given)) is True
    assert embedding_to_config(None) is False
    with pytest.raises(ValueError, match="Unknown embedding 'lstm'; known: .*'cnn', 'mlp', 'set'"):
        resolve_embedding("lstm")
    with pytest.raises(TypeError, match="got int"):
        resolve_embedding(3)


@pytest.mark.parametrize(("make", "match"), [
    (lambda: MLPEmbedding(features=0), "at least 1"),
    (lambda: SetEmbedding(hidden=0), "at least 1"),
    (lambda: CNNEmbedding(kernel=4), "odd kernel"),
    (lambda: CNNEmbedding(channels=()), "at least one convolution"),
    (lambda: CNNEmbedding(dimensions=3), "dimensions 1, 2 or None"),
    (lambda: CNNEmbedding()((2, 3, 4, 5)), "2 spatial axes"),
    (lambda: CNNEmbedding(dimensions=2)((5,)), "2 spatial axes"),
    (lambda: SetEmbedding()(()), "rows that are sets"),
])
def test_bad_embeddings(make, match):
    with pytest.raises(ValueError, match=match):
        make()
