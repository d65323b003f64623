"""Sparse attention of M3 over several devices, with all index keys on every rank and with them shared out."""
