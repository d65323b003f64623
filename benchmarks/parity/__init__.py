"""Checks an implementation of the operations against the reference in float32, on poisoned ragged batches."""
