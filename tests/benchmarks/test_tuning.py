"""The table of measured launches: what it holds can be launched, and tuning keeps what it did not measure."""

from benchmarks.tuning import ATTEND, ATTEND_FP8, PAGES, TABLES, Shape, shapes, table_text
from minimax_kernels import launch_table, measured_launches


def test_measured_launches_are_candidates_of_their_kind():
    for name in TABLES:
        candidates = {"page": PAGES, "attend_decode_fp8": ATTEND_FP8}.get(name, ATTEND)
        for (rows, size), launch in getattr(measured_launches, name.upper()).items():
            assert rows in (8, 16) and size & (size - 1) == 0 and launch in candidates


def test_lookups_take_the_next_larger_size_and_formulas_beyond(monkeypatch):
    monkeypatch.setattr(launch_table, "ATTEND_DECODE", {(8, 4): (4, 64, 8, 3), (8, 16): (16, 128, 4, 1)})
    four, sixteen = (launch_table.attend_launch(tokens, 1, 16, 8) for tokens in (3, 5))
    assert (four.blocks_per_program, four.launch.num_warps) == (4, 8) and sixteen.blocks_per_program == 1
    beyond, other_heads = launch_table.attend_launch(64, 1, 16, 8), launch_table.attend_launch(3, 1, 16, 16)
    assert beyond.blocks_per_program == 4 and other_heads.blocks_per_program == 1
    assert launch_table.attend_launch(3, 1, 2, 8).blocks_per_program == 1  # fewer pages than programs were measured for


def test_a_new_table_keeps_what_was_not_measured():
    best = {name: {} for name in TABLES}
    best["page"] = {(16, 1 << 20): (8, 4)}
    found: dict = {}
    exec(table_text(best), found)
    assert found["ATTEND_DECODE"] == measured_launches.ATTEND_DECODE
    assert found["PAGE"] == {**measured_launches.PAGE, **best["page"]}


def test_shapes_are_keyed_as_the_kernels_look_them_up():
    assert Shape("decode", 1, 16).key == (16, 64) and Shape("few", 8, 100).key == (8, 128)
    assert Shape("page", 8, 8192).key == (8, 16384)
    assert len({(shape.kind, shape.key) for shape in shapes(("decode", "fp8", "few", "page"), False)}) == 48


def test_candidates_of_decode_fill_the_device():
    assert {launch[0] for launch in Shape("decode", 8, 1).candidates} == {8, 16}
    assert {launch[0] for launch in Shape("decode", 8, 128).candidates} == {1, 2, 3, 4, 6, 8}
    assert {launch[0] for launch in Shape("fp8", 1, 256).candidates} == {1}
    assert all(len(shape.candidates) > 1 for shape in shapes(("decode", "fp8", "few", "page"), False))


def test_few_tokens_of_prompts_take_more_programs_than_they_need_to_fill_the_device(monkeypatch):
    monkeypatch.setattr(launch_table, "ATTEND_FEW", {})
    one, four = (launch_table.attend_launch(171, groups, 16, 8, prefill=True) for groups in (1, 4))
    assert (one.blocks_per_program, four.blocks_per_program) == (6, 8)
    assert launch_table.attend_launch(171, 4, 16, 16).blocks_per_program == 16  # decode


def test_caches_of_8_bits_have_launches_of_their_own(monkeypatch):
    monkeypatch.setattr(launch_table, "ATTEND_DECODE", {(8, 64): (4, 64, 4, 3)})
    monkeypatch.setattr(launch_table, "ATTEND_DECODE_FP8", {(8, 64): (2, 128, 4, 3)})
    wide, narrow = (launch_table.attend_launch(64, 1, 16, 8, fp8=fp8) for fp8 in (False, True))
    assert (wide.blocks_per_program, wide.keys_per_step) == (4, 64)
    assert (narrow.blocks_per_program, narrow.keys_per_step) == (8, 128)


def test_scores_of_few_queries_share_pages_out_evenly():
    def pages(tokens, blocks, fp8=False):
        return launch_table.score_launch(tokens, blocks, 1, 1, fp8=fp8).blocks_per_program

    assert [pages(tokens, 10) for tokens in (1, 64, 128)] == [1, 2, 3]  # about one go
    assert [pages(128, 49), pages(8, 465), pages(32, 1600)] == [2, 2, 4]
    assert [pages(1, 10, True), pages(128, 10, True), pages(128, 49, True)] == [1, 4, 8]
