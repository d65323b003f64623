"""The benchmark of the engine on a GPU: cache sizing, the host's share of a decode step."""
