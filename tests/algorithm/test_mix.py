"""Who is averaged with whom: graphs, their contraction, and what they have in common."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.algorithm.mix import TOPOLOGIES, averages, neighbourhoods
from dtrain.config.average import MixConfig
from dtrain.errors import InvalidConfig


def matrix(config: MixConfig, number: int, replicas: int) -> npt.NDArray[np.float64]:
    """The matrix of a round whose weights are equal: row k makes the next parameters of replica k."""
    mixing = np.zeros((replicas, replicas))
    for k, members in enumerate(neighbourhoods(config, number, replicas)):
        mixing[k, list(members)] = 1 / len(members)
    return mixing


def contraction(mixing: npt.NDArray[np.float64]) -> float:
    """The factor by which a round brings replicas together at least: the second singular value."""
    return float(np.linalg.svd(mixing - 1 / len(mixing), compute_uv=False)[0])


configs = st.sampled_from(list(TOPOLOGIES)).flatmap(
    lambda topology: (
        st.builds(MixConfig, topology=st.just(topology), groups=st.integers(1, 4), period=st.integers(1, 3))
        if topology == "hierarchical"
        else st.just(MixConfig(topology=topology))
    )
)


@given(configs, st.integers(1, 20), st.integers(4, 17))
def test_everybody_is_averaged_with_itself_and_weighs_as_much_as_it_gets(
    config: MixConfig, number: int, replicas: int
) -> None:
    members = neighbourhoods(config, number, replicas)
    assert len(members) == replicas
    assert all(k in of and list(of) == sorted(set(of)) and max(of) < replicas for k, of in enumerate(members))
    mixing = matrix(config, number, replicas)
    np.testing.assert_allclose(mixing.sum(axis=0), 1)  # the mean of all replicas stays
    np.testing.assert_allclose(mixing.sum(axis=1), 1)


@pytest.mark.parametrize(("replicas", "factor"), [(8, 0.805), (16, 0.949), (32, 0.987)])
def test_the_contraction_of_a_ring(replicas: int, factor: float) -> None:
    assert contraction(matrix(MixConfig(topology="ring"), 1, replicas)) == pytest.approx(factor, abs=1e-3)


@pytest.mark.parametrize(("replicas", "factor"), [(8, 0.50), (16, 0.60), (32, 0.667)])
def test_the_graphs_of_a_period_together_are_the_static_exponential_graph(replicas: int, factor: float) -> None:
    config, mixing = MixConfig(topology="exponential"), np.zeros((replicas, replicas))
    for number in range(1, replicas.bit_length()):
        mixing += matrix(config, number, replicas) > 0
    mixing = (mixing > 0) / replicas.bit_length()  # itself, and one peer a round
    np.testing.assert_allclose(mixing.sum(axis=1), 1)
    assert contraction(mixing) == pytest.approx(factor, abs=1e-3)


@pytest.mark.parametrize("replicas", [2, 4, 8, 16])
@pytest.mark.parametrize("first", [1, 2, 5])
def test_the_exponential_graph_averages_exactly_in_as_many_rounds_as_the_binary_logarithm(
    replicas: int, first: int
) -> None:
    product, config = np.eye(replicas), MixConfig(topology="exponential")
    for number in range(first, first + replicas.bit_length() - 1):
        assert contraction(product) > 0.1
        product = matrix(config, number, replicas) @ product
    np.testing.assert_allclose(product, 1 / replicas, atol=1e-12)


def test_the_exponential_graph_by_hand() -> None:
    config = MixConfig(topology="exponential")
    assert neighbourhoods(config, 1, 5) == ((0, 1), (1, 2), (2, 3), (3, 4), (0, 4))
    assert neighbourhoods(config, 2, 5) == ((0, 2), (1, 3), (2, 4), (0, 3), (1, 4))
    assert neighbourhoods(config, 3, 5) == ((0, 4), (0, 1), (1, 2), (2, 3), (3, 4))
    assert neighbourhoods(config, 4, 5) == neighbourhoods(config, 1, 5)
    assert neighbourhoods(config, 7, 1) == ((0,),)


def test_groups_and_periods_by_hand() -> None:
    config = MixConfig(topology="hierarchical", groups=2, period=3)
    halves = ((0, 1), (0, 1), (2, 3, 4), (2, 3, 4), (2, 3, 4))
    assert [neighbourhoods(config, number, 5) for number in (1, 2, 4)] == [halves] * 3
    assert neighbourhoods(config, 3, 5) == (tuple(range(5)),) * 5
    alone = MixConfig(topology="hierarchical", groups=5, period=2)
    assert neighbourhoods(alone, 1, 5) == ((0,), (1,), (2,), (3,), (4,))


@given(st.integers(1, 9), st.integers(1, 9))
def test_one_group_and_a_period_of_one_are_full_averaging(number: int, replicas: int) -> None:
    full = neighbourhoods(MixConfig(), number, replicas)
    for config in (
        MixConfig(topology="hierarchical", groups=1, period=4),
        MixConfig(topology="hierarchical", groups=replicas, period=1),
    ):
        assert neighbourhoods(config, number, replicas) == full
    assert len(averages(full, [None] * replicas)) == 1


@pytest.mark.parametrize("groups", [0, 6])
def test_groups_that_do_not_fit_are_refused(groups: int) -> None:
    with pytest.raises(InvalidConfig, match=f"average.mix.groups = {groups}.*5 replicas") as caught:
        neighbourhoods(MixConfig(topology="hierarchical", groups=groups), 1, 5)
    assert "1 to 5" in caught.value.hint
