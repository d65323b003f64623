"""Identical segments share an executable, different ones never do; what explain and picture show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from segmented_samples import ROWS, WIDTH, compilations, into, rows_of, segmented, stack, weights

from minimax_jax.segmented.explain import explain_text
from minimax_jax.segmented.graphs import GraphUse, graph_order, parse_launches


def test_identical_layers_share_one_executable():
    split = segmented(stack)
    w = weights(40)
    got = split(w, rows_of(ROWS))
    # first, second (whose input is the caller's, so not given up), middle, last
    assert split.stats().executables == 4 and split.stats().segments == 41
    np.testing.assert_allclose(got, stack(w, jnp.asarray(rows_of(ROWS))), rtol=1e-4, atol=1e-5)


def test_derivative_rules_inside_control_flow_keep_no_layers_apart():
    """Kernels that XLA chooses between bring a rule each, a new function in every layer; nothing is differentiated."""

    def layer(x):
        @jax.custom_jvp
        def double(x):
            return 2.0 * x

        double.defjvp(lambda primals, tangents: (double(*primals), 2.0 * tangents[0]))
        return jax.lax.cond(x[0, 0] > 0, double, jnp.negative, x)

    def layers(_, x):
        for _ in range(6):
            x = layer(into(x))
        return [x]

    split = segmented(layers)
    (got,) = split(None, rows_of(ROWS))
    assert split.stats().segments == 7 and split.stats().executables <= 4
    np.testing.assert_allclose(got, layers(None, jnp.asarray(rows_of(ROWS)))[0], rtol=1e-5)


def test_every_bucket_has_executables_of_its_own():
    split = segmented(stack, buckets=(4, 8))
    for live in (3, 8):
        split(weights(5), rows_of(live))
    assert split.stats().executables == 8


DIFFERENCES = {
    "literal": (lambda x: x * 2.0, lambda x: x * 2.0000002),
    "sign of zero": (lambda x: jnp.copysign(x, 0.0), lambda x: jnp.copysign(x, -0.0)),
    "operand order": (lambda x: x[:, :1] - x[:, 1:2], lambda x: x[:, 1:2] - x[:, :1]),
    "parameter": (lambda x: jax.lax.slice(x, (0, 0), (6, 1)), lambda x: jax.lax.slice(x, (0, 1), (6, 2))),
    "type": (lambda x: x.astype(jnp.bfloat16), lambda x: x.astype(jnp.float16)),
    "inner jaxpr": (
        lambda x: jax.lax.fori_loop(0, 2, lambda i, y: y + 1.0, x),
        lambda x: jax.lax.fori_loop(0, 2, lambda i, y: y - 1.0, x),
    ),
    "trip count": (
        lambda x: jax.lax.fori_loop(0, 2, lambda i, y: y + 1.0, x),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y + 1.0, x),
    ),
    "bool and int": (lambda x: jnp.argsort(x, stable=True), lambda x: jnp.argsort(x, stable=False)),
}


@pytest.mark.parametrize("case", sorted(DIFFERENCES))
def test_what_differs_is_compiled_apart(case):
    one, two = DIFFERENCES[case]

    x = rows_of(ROWS)
    results = segmented(lambda _, x: [one(into(x, 1)), two(into(x, 1))])(None, x)
    for got, expected in zip(results, (one(3 * x), two(3 * x)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)

    def layers(x, parts):
        outs = []
        for part in parts:
            x = into(x)
            outs.append(part(x))
            x = into(x)
        return outs

    same = segmented(lambda _, x: layers(x, (one, one, one)))
    other = segmented(lambda _, x: layers(x, (one, two, one)))
    same(None, x)
    other(None, x)
    assert other.stats().executables == same.stats().executables + 1


def test_constants_are_inputs_and_do_not_stop_sharing():
    tables = [np.full((WIDTH,), n, np.float32) for n in range(4)]

    def fn(_, x):
        for table in tables:
            x = into(x + jnp.asarray(table) * jnp.ones((64, WIDTH))[:1])
        return x

    split = segmented(fn)
    x = rows_of(ROWS)
    np.testing.assert_allclose(split(None, x), fn(None, jnp.asarray(x)), rtol=1e-5)


def test_sharing_compiles_as_many_times_as_it_says():
    split = segmented(stack)
    w = weights(12)
    split(w[:1], rows_of(ROWS))  # loads what JAX compiles for itself
    before = compilations()
    fresh = segmented(stack)
    fresh(w, rows_of(ROWS))
    assert compilations() - before == fresh.stats().executables == 4


def test_explain_tells_how_the_kernels_of_a_graph_are_ordered():
    split = segmented(stack)
    split(weights(2), rows_of(4))
    use = {"segment_0": GraphUse(1, {"kKernel": 5}, {})}
    text = explain_text("stack", split.program(), split.stats(), use, graph_order({}))
    assert "kernels of a graph run one after the other (XLA's default)" in text
    assert "side by side" in graph_order({"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"})
    assert "kernels of a graph" not in explain_text("stack", split.program(), split.stats(), {}, "")


def test_explain_tells_the_split_and_folds_what_repeats():
    split, w = segmented(stack), weights(30)
    for _ in range(3):
        split(w, rows_of(ROWS))
    text = split.explain()
    assert "31 segments (4 executables) around 30 boundaries" in text
    assert "host: 'test_scale'(layer=0)" in text and "more segments of C" in text
    assert len(text.splitlines()) < 50 and "replays  1" in text
    assert "replays  1" in split.explain(rows=ROWS)
    picture = split.picture()
    assert picture.startswith("<svg") and picture.endswith("</svg>") and picture.count("<rect") == 61


def test_dumps_of_launches_are_read():
    text = """
000: kKernel	fusion_1
001: kCommandBuffer	command_buffer
  000: kKernel	fusion_2
  001: kGemm	custom-call.1
    000: kKernel	nested
002: kGemm	custom-call.2
003: kCommandBuffer	command_buffer
  condition:
  000: kKernel	triton
"""
    use = parse_launches(text)
    assert use.graphs == 2
    assert use.inside == {"kKernel": 3, "kGemm": 1} and use.outside == {"kKernel": 1, "kGemm": 1}
    assert str(use) == "2 CUDA graphs with 4 launches; outside: 1 kGemm, 1 kKernel"
    assert str(parse_launches("000: kKernel\tx\n")) == "no CUDA graph; 1 launches"


def test_a_dump_directory_is_written_and_a_cpu_has_no_graphs(tmp_path):
    split = segmented(stack, dump_to=tmp_path)
    split(weights(2), rows_of(ROWS))
    assert any(tmp_path.iterdir())
    assert split.graphs() == {}
