"""The peer on this machine: vLLM's own kernels over the cases of benchmarks/data, for scripts/bench_vllm.py."""
