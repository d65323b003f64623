"""Tokens find their experts' ranks and come back, whatever they chose, in every way that there is to send them."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_collectives import collectives, replica_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from parallel_models import four_head_config

from minimax_jax.parallel import ParallelConfig, ParallelError, check_processes
from minimax_jax.parallel.comm import MeshComm
from minimax_jax.parallel.config import EXPERTS, REQUESTS
from minimax_jax.parallel.config import TOKENS as SAME_TOKENS
from minimax_jax.parallel.expert_routes import summed, token_routes
from minimax_jax.parallel.mesh import make_mesh
from minimax_jax.parallel.ragged_exchange import ragged_exchange

NUM_EXPERTS, HIDDEN, TOKENS, CHOICES = 16, 8, 5, 3  # tokens of a data rank
GATHER = [(1, 8, 8), (2, 8, 4)]
WAYS = {
    **{(sizes, 1, None): "gather" for sizes in GATHER},
    **{(sizes, 1, 1): "all-to-all" for sizes in [*GATHER, (4, 8, 2)]},
    **{(sizes, 2, None): "two levels" for sizes in [*GATHER, (4, 8, 2), (4, 4, 2)]},
    ((1, 8, 8), 2, 1): "all-to-all over hosts",
}


def parallel_of(way):
    sizes, hosts, least = way
    return ParallelConfig(*sizes, hosts=hosts, all_to_all_tokens=least)


def experts_of(factors):
    """Experts that multiply by a number each."""

    def run(x, expert_ids, weights, addend=None, first_expert=0):
        local = expert_ids - first_expert
        here = (local >= 0) & (local < factors.shape[0])
        known = jnp.where(here, factors[jnp.where(here, local, 0)], 0)
        total = x * (known * weights).sum(axis=1, keepdims=True)
        return total if addend is None else total + addend

    return run


@functools.cache
def dispatched(way):
    """A compiled function (x, ids, weights, factors) -> y over eight ranks."""
    parallel = parallel_of(way)
    comm = MeshComm(parallel, NUM_EXPERTS // parallel.expert)
    sharing = 8 // parallel.expert  # ranks with the same expert, of which each gives its part

    def shared(x):  # this rank's part
        return x / parallel.size(SAME_TOKENS)

    def rank(x, ids, weights, factors):
        return comm.sum_mlp(comm.run_experts(experts_of(factors / sharing), x, ids, weights, shared))

    rows = P(REQUESTS)
    body = jax.shard_map(
        rank, mesh=make_mesh(parallel), in_specs=(rows, rows, rows, P(EXPERTS)), out_specs=rows, check_vma=False
    )
    return jax.jit(body)


def arguments(way, ids, seed=0):
    random = np.random.default_rng(seed)
    count = way[0][2] * TOKENS
    x, factors = random.normal(size=(count, HIDDEN)), random.normal(size=NUM_EXPERTS)
    weights = random.uniform(0.1, 1, (count, CHOICES))
    return tuple(np.asarray(a, np.float32) if a.dtype != np.int32 else a for a in (x, ids[:count], weights, factors))


def expected(x, ids, weights, factors):
    return x * (1 + (factors[ids] * weights).sum(axis=1, keepdims=True))


@st.composite
def choices(draw):
    """[40, 3] different experts of each token: of all, of a few ranks, or the same for every token."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pool = random.permutation(NUM_EXPERTS)[: draw(st.sampled_from([CHOICES, 4, 9, NUM_EXPERTS]))]
    return np.stack([random.permutation(pool)[:CHOICES] for _ in range(8 * TOKENS)]).astype(np.int32)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_token_is_answered_by_all_its_experts(way):
    @settings(max_examples=8)
    @given(choices())
    def check(ids):
        given = arguments(way, ids)
        np.testing.assert_allclose(dispatched(way)(*given), expected(*given), rtol=1e-5, atol=1e-5)

    check()


def gathers(*groups):
    return [("all-gather", own) for own in groups]


def test_what_is_said_between_which_ranks():
    """Over two hosts of four ranks each collective but that of the choices is within a host or between both."""
    ids = np.zeros((40, CHOICES), np.int32) + np.arange(CHOICES, dtype=np.int32)

    def text(way):
        return dispatched(way).lower(*arguments(way, ids)).compile().as_text()

    def kinds(way):
        return collections.Counter(kind for kind, _ in collectives(text(way)))

    assert kinds(((1, 8, 8), 1, None)) == {"all-gather": 2, "reduce-scatter": 1}
    assert kinds(((2, 8, 4), 1, None)) == {"all-gather": 2, "reduce-scatter": 1, "all-reduce": 1}
    inside, across = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7))
    every = (tuple(range(8)),)
    found = replica_groups(text(((1, 8, 8), 2, None)))
    sums = [("reduce-scatter", inside), ("reduce-scatter", across)]
    assert sorted(found) == sorted([*gathers(every, across, inside), *sums])
    found = replica_groups(text(((2, 8, 4), 2, None)))
    choices_only = ((0, 2, 4, 6), (1, 3, 5, 7))
    last = ("all-reduce", ((0, 1), (2, 3), (4, 5), (6, 7)))
    assert sorted(found) == sorted([*gathers(choices_only, across, inside), *sums, last])


def test_between_hosts_each_rank_sends_its_share_of_a_token():
    way = ((4, 8, 2), 2, None)
    ids = np.zeros((40, CHOICES), np.int32) + np.arange(CHOICES, dtype=np.int32)
    text = dispatched(way).lower(*arguments(way, ids)).compile().as_text()
    across = ((0, 4), (1, 5), (2, 6), (3, 7))
    sizes = [size for (kind, size), (_, groups) in zip(collectives(text), replica_groups(text), strict=True)
             if groups == across and kind == "all-gather"]  # fmt: skip
    # the choices of both hosts' tokens, and a quarter of each hidden state
    assert sorted(sizes) == sorted([2 * TOKENS * 2 * CHOICES, 2 * TOKENS * HIDDEN // 4])


def test_on_gpus_the_exchange_is_ragged():
    for way in (((1, 8, 8), 1, 1), ((1, 8, 8), 2, 1)):
        traced = dispatched(way).trace(*arguments(way, np.zeros((40, CHOICES), np.int32)))
        for platform, count in (("cuda", 2), ("cpu", 0)):
            assert traced.lower(lowering_platforms=(platform,)).as_text().count("@ragged_all_to_all") == count


@jax.jit
def routes_of(destinations, rank):
    """(tokens that arrive, tokens that leave, the exchange there, how many answers each token sums)."""
    routes = token_routes(destinations, rank)
    answers = jnp.ones((routes.sent.shape[0], 1))
    return routes.arrived, routes.sent, routes.there, summed(answers, routes.slots)


@settings(max_examples=25)
@given(choices(), st.integers(0, 3))
def test_routes_bring_each_token_once_to_each_of_its_ranks(ids, column):
    """Four data ranks of ten tokens, experts dealt to them or, every fifth one, to none of this column."""
    ranks, tokens = 4, 10
    destinations = np.where(ids % 5 == column, ranks, ids % ranks).reshape(ranks, tokens, CHOICES)
    routes = [routes_of(destinations, rank) for rank in range(ranks)]
    for rank, (arrived, sent, there, _) in enumerate(routes):
        expected = [t for t in range(ranks * tokens) if rank in destinations.reshape(-1, CHOICES)[t]]
        arrived = np.asarray(arrived)
        np.testing.assert_array_equal(arrived[: len(expected)], expected)
        assert (arrived[len(expected) :] == ranks * tokens).all()
        starts, counts, places, come = map(np.asarray, there)
        assert come.sum() == len(expected)
        for target in range(ranks):
            leaving = np.asarray(sent)[starts[target] : starts[target] + counts[target]]
            np.testing.assert_array_equal(leaving, np.flatnonzero((destinations[rank] == target).any(axis=1)))
            # it is placed where the target expects it
            wanted = np.asarray(routes[target][0])[places[target] : places[target] + counts[target]]
            np.testing.assert_array_equal(wanted, rank * tokens + leaving)
    np.testing.assert_array_equal(routes[0][3][:, 0], [len(set(own) - {ranks}) for own in destinations[0]])


def test_rows_that_nobody_sends_are_zeros():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("r",))

    def rank(rows):
        me = jax.lax.axis_index("r")
        counts = jnp.where(jnp.arange(2) == 1 - me, 2, 0)
        return ragged_exchange(rows, jnp.array([1, 1]), counts, jnp.full(2, me), counts, num_rows=4, axes=("r",))

    rows = np.arange(1, 7, dtype=np.float32)[:, None]  # three of each rank
    swapped = jax.shard_map(rank, mesh=mesh, in_specs=P("r"), out_specs=P("r"), check_vma=False)(rows)
    np.testing.assert_array_equal(np.asarray(swapped)[:, 0], [0, 5, 6, 0, 2, 3, 0, 0])


def test_hosts_and_thresholds_that_cannot_be_are_named(monkeypatch):
    with pytest.raises(ParallelError, match="hosts = 3: must divide attention_data = 4"):
        ParallelConfig(1, 4, 4, hosts=3)
    with pytest.raises(ParallelError, match="all_to_all_tokens = 0: must be an integer >= 1"):
        ParallelConfig(1, 4, 4, all_to_all_tokens=0)
    with pytest.raises(ParallelError, match="same tokens = 4: must divide hidden_size = 66"):
        ParallelConfig(4, 8, 2, hosts=2).check(four_head_config(hidden_size=66), 8)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ParallelError, match="hosts = 4: must divide the 2 processes"):
        check_processes(ParallelConfig(1, 8, 8, hosts=4))
