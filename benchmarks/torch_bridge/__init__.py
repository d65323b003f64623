"""What scripts/check_torch_gpu.py proves and times of the torch bridge."""
