"""What runs beside a collective, as a scheduled module of XLA's lists it."""

import pytest

from benchmarks.multi_gpu.schedule import beside_collectives

MODULE = """HloModule jit_rank, is_scheduled=true, entry_computation_layout={()->bf16[4,8]{1,0}}

%inner (p: bf16[4,8]) -> bf16[4,8] {
  ROOT %all-reduce.9 = bf16[4,8]{1,0} all-reduce(%p), replica_groups={}
}

ENTRY %main (x.1: bf16[4,8]) -> bf16[4,8] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %all_gather.1 = s32[8,2]{1,0} all-gather(%x.1), dimensions={0}
  %reduce-scatter-start = ((bf16[32,8]{1,0}), bf16[4,8]{1,0}) reduce-scatter-start(%x.1), dimensions={0}
  %gemm_fusion_dot.16 = bf16[4,8]{1,0} fusion(%x.1), kind=kCustom
  %loop_convert_fusion = bf16[4,8]{1,0} fusion(%gemm_fusion_dot.16), kind=kLoop
  %bitcast.1 = bf16[4,8]{1,0} bitcast(%loop_convert_fusion)
  %gemm_fusion_dot.17 = bf16[4,8]{1,0} fusion(%bitcast.1), kind=kCustom
  %reduce-scatter-done = bf16[4,8]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %gemm_fusion_dot.18 = bf16[4,8]{1,0} fusion(%x.1), kind=kCustom
  ROOT %loop_add_fusion = bf16[4,8]{1,0} fusion(%reduce-scatter-done, %gemm_fusion_dot.18), kind=kLoop
}
"""


def test_products_between_start_and_end_are_counted_and_no_others():
    gathered, scattered = beside_collectives(MODULE)
    assert (gathered.kind, gathered.asynchronous, gathered.products, gathered.others) == ("all-gather", False, (), 0)
    assert (scattered.kind, scattered.asynchronous, scattered.others) == ("reduce-scatter", True, 1)
    assert scattered.products == ("gemm_fusion_dot.16", "gemm_fusion_dot.17")


def test_an_order_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match="is_scheduled=true"):
        beside_collectives(MODULE.replace("is_scheduled=true", "is_scheduled=false"))
