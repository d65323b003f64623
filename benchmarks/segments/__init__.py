"""What segments cost and gain against one jit; see scripts/bench_segmented.py."""
