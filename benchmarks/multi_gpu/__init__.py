"""MiniMax-M3 over the GPUs of one host: the same tokens as one GPU, step times, dispatch, load, a killed process."""
