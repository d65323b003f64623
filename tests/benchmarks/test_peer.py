"""The peer's harness, with kernels of this test's own in the place of vLLM's."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.case_data import Queries
from benchmarks.cases import BLOCK, HEAD_DIM, HEADS, TOPK, Baselines, Case, Heads, decode_cases, prefill_cases

torch = pytest.importorskip("torch")

from benchmarks.peer import check, vllm_kernels  # noqa: E402
from benchmarks.peer.inputs import index_queries, make_inputs, make_pool  # noqa: E402
from benchmarks.peer.measure import Operations, measure_decode, measure_prefill, row_of, time_calls  # noqa: E402

CPU = torch.device("cpu")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_vllm.py"
VLLM = {"minimax_m3_index_score", "minimax_m3_index_topk", "minimax_m3_index_decode_score", "minimax_m3_index_decode"}
VLLM |= {"minimax_m3_sparse_attn", "minimax_m3_sparse_attn_decode"}


def visible(query_starts, kv_lens):
    """(request, row, keys that it sees) of each query."""
    for request, (begin, end) in enumerate(itertools.pairwise(query_starts.tolist())):
        for row in range(begin, end):
            yield request, row, int(kv_lens[request]) - int(end) + row + 1


def score_blocks(idx_q, index_cache, tables, query_starts, kv_lens, **_):
    scores = torch.full((idx_q.shape[1], idx_q.shape[0], tables.shape[1]), -torch.inf)
    for request, row, seen in visible(query_starts, kv_lens):
        pages = tables[request, : -(-seen // BLOCK)].long()
        products = idx_q[row].float() @ index_cache[pages].flatten(0, 1)[:seen].float().T
        padded = torch.nn.functional.pad(products, (0, len(pages) * BLOCK - seen), value=-torch.inf)
        scores[:, row, : len(pages)] = padded.unflatten(1, (-1, BLOCK)).amax(-1)
    return scores


def select(scores, query_starts, kv_lens, out):
    for _, row, seen in visible(query_starts, kv_lens):
        blocks, own = -(-seen // BLOCK), scores[:, row].clone()
        own[:, blocks - 1] = torch.inf
        best = own[:, :blocks].topk(min(TOPK, blocks)).indices
        out[:, row] = -1
        out[:, row, : best.shape[1]] = best
    return out


def attend(q, kv, selected, tables, query_starts, kv_lens, sm_scale, output):
    group = q.shape[1] // kv.shape[1]
    for request, row, seen in visible(query_starts, kv_lens):
        for head in range(kv.shape[1]):
            blocks = selected[head, row][selected[head, row] >= 0].long()
            keys, values = kv[tables[request, blocks].long(), head].float().flatten(0, 1).split(HEAD_DIM, dim=-1)
            at = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
            products = sm_scale * q[row, head * group : (head + 1) * group].float() @ keys.T
            weights = products.masked_fill(at >= seen, -torch.inf).softmax(-1)
            output[row, head * group : (head + 1) * group] = (weights @ values).to(output.dtype)


def own_kernels(scale=1.0, forget=0):
    """By the definitions; `scale` makes attention wrong, `forget` leaves blocks out of selections."""

    def one_each(kv_lens):
        return torch.arange(len(kv_lens) + 1)

    def decode_index(idx_q, cache, tables, kv_lens, _longest, *, out, **_):
        chosen = select(score_blocks(idx_q, cache, tables, one_each(kv_lens), kv_lens), one_each(kv_lens), kv_lens, out)
        chosen[..., TOPK - forget :] = -1
        return chosen

    def prefill_select(scores, starts, prefixes, *, out, **_):
        return select(scores, starts, prefixes + starts.diff(), out)

    def prefill_attention(q, kv, selected, tables, starts, kv_lens, _prefixes, *, sm_scale, output, **_):
        attend(q, kv, selected, tables, starts, kv_lens, scale * sm_scale, output)

    def decode_attention(q, kv, selected, tables, kv_lens, *, sm_scale, output, **_):
        attend(q, kv, selected, tables, one_each(kv_lens), kv_lens, scale * sm_scale, output)

    return vllm_kernels.VllmKernels(
        version="own",
        prefill_score=lambda q, cache, tables, starts, lens, _, **options: score_blocks(q, cache, tables, starts, lens),
        prefill_select=prefill_select,
        decode_score=lambda q, cache, tables, lens, _, **options: score_blocks(q, cache, tables, one_each(lens), lens),
        decode_index=decode_index,
        prefill_attention=prefill_attention,
        decode_attention=decode_attention,
    )


def test_right_kernels_pass_the_check():
    assert check.check(own_kernels(), Heads(2, 4, 2, 2), CPU) == []


def test_wrong_kernels_do_not():
    wrong = check.check(own_kernels(scale=1.5), HEADS[8], CPU)
    assert len(wrong) == 2 and all("attention is off by" in text for text in wrong)
    (text,) = check.check(own_kernels(forget=1), HEADS[8], CPU)
    assert text.startswith("decode of 8/1 heads: only 9") and "of the selected blocks" in text


def test_inputs_are_those_of_the_benchmark():
    case, heads = Case("prefill", "x", 1, (300, 1), (5, 2 * BLOCK)), HEADS[1]
    pool = make_pool(20, heads, CPU)
    assert pool.kv.shape == (20, 4, BLOCK, 2 * HEAD_DIM) and 0.9 < float(pool.kv.float().std()) < 1.1
    first, second = make_inputs(case, heads, pool, index_queries(Queries(heads, 301), 0.9, 301, CPU), sets=2)
    own = [{*table[0, :3].tolist(), *table[1, :3].tolist()} for table in (first.block_table, second.block_table)]
    assert [len(pages) for pages in own] == [6, 6] and not own[0] & own[1]
    assert first.query_starts.tolist() == [0, 300, 301] and first.kv_lens.tolist() == [305, 257]
    with pytest.raises(ValueError, match="sets = 4: x needs 6 pages a set and the pool has 20"):
        make_inputs(case, heads, pool, index_queries(Queries(heads, 301), 0.9, 301, CPU), sets=4)
    drift = index_queries(Queries(HEADS[8], 4000), 0.9, 4000, CPU).float()[:, 0]
    assert float((drift[1:] * drift[:-1]).mean() / drift.square().mean()) == pytest.approx(0.9, abs=0.01)
    assert float(index_queries(Queries(HEADS[8], 4000), 0.0, 4000, CPU).float().std()) == pytest.approx(1, abs=0.01)


def test_rows_are_a_baseline(tmp_path):
    heads, rows = HEADS[8], []
    cases = decode_cases()[0].shrunk(64), prefill_cases()[0].shrunk(512)
    for case in cases:
        pool = make_pool(sum(case.blocks), heads, CPU)
        operations = Operations(own_kernels(), case, heads, pool)
        sets = make_inputs(case, heads, pool, index_queries(Queries(heads, case.tokens), 0.0, case.tokens, CPU), 1)
        measured = (measure_decode if case.phase == "decode" else measure_prefill)(operations, sets)
        rows.append(row_of(case, heads, 0.0, measured))
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    decode, prefill = (Baselines(file).of(case, heads, 0.0) for case in cases)
    assert set(decode) == {"score", "index", "attention", "chain"} and all(us > 0 for us in decode.values())
    parts = prefill["score"] + prefill["select"] + prefill["attention"]
    assert prefill["chain"] == pytest.approx(parts) and prefill["union8"] >= 1
    assert Baselines(file).of(cases[0], HEADS[1], None) == {}


def test_a_file_that_is_no_baseline_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"op": "decode"}\n')
    with pytest.raises(ValueError, match=r"x.jsonl: a line is not one of scripts/bench_vllm.py: 'case'"):
        Baselines(tmp_path / "x.jsonl")


def test_every_set_is_called():
    case, heads = Case("decode", "x", 1, (1,), (BLOCK,)), HEADS[8]
    sets = make_inputs(case, heads, make_pool(6, heads, CPU), index_queries(Queries(heads, 1), 0.0, 1, CPU), 3)
    called = []
    assert time_calls(lambda own: called.append(id(own)), sets, CPU) >= 0
    assert called == [id(own) for own in sets]


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code


def test_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vllm_kernels, "load", lambda sources: own_kernels())
    options = ("--device", "cpu", "--tp", 8, "--shrink", 2000, "--max-cases", 1, "--out", tmp_path / "out")
    assert run_script(monkeypatch, tmp_path, *options) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "vllm.jsonl").read_text().splitlines()]
    assert [(row["op"], row.get("rho")) for row in rows] == [("prefill", 0.99), ("prefill", 0.0), ("decode", None)]
    assert json.loads((tmp_path / "out" / "vllm.json").read_text())["vllm"] == "own"
    assert "WRONG" not in capsys.readouterr().out
    monkeypatch.setattr(vllm_kernels, "load", lambda sources: own_kernels(forget=1))
    assert run_script(monkeypatch, tmp_path, *options) == 1
    assert "WRONG: decode of 8/1 heads" in capsys.readouterr().out


def test_sources_are_found_or_missed_in_words(tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, tmp_path, "--device", "cpu") == 2
    assert f"sources = {tmp_path}: has no vllm/models/minimax_m3/common/ops/index_topk.py" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    monkeypatch.setitem(sys.modules, "triton.language", type(sys)("triton.language"))
    folder = tmp_path / vllm_kernels.FOLDER
    folder.mkdir(parents=True)
    lines = ["from vllm.triton_utils import tl, triton", "from vllm.platforms import current_platform"]
    lines += ["from vllm.utils.math_utils import round_up", "SIZE = round_up(17, 16)"]
    functions = [f"def {name}(): return SIZE" for name in sorted(VLLM)]
    for name in ("index_topk.py", "sparse_attn.py"):
        (folder / name).write_text("\n".join(lines + functions) + "\n")
    (tmp_path / "PKG-INFO").write_text("Name: vllm\nVersion: 1.2\n")
    kernels = vllm_kernels.load(tmp_path)
    assert kernels.version == "1.2" and kernels.decode_index() == kernels.prefill_attention() == 32
    assert all(callable(value) for name, value in vars(kernels).items() if name != "version")
    assert not [name for name in sys.modules if name.split(".")[0] == "vllm"]
