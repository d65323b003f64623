"""Measures the kernels of minimax_kernels on the MSA workload against vLLM's and against the hardware's floor."""
