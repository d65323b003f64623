"""One of several processes that generate together: `python generate_process.py PORT COUNT NUMBER TP EP ADP`.

Prints one JSON object: tokens, bytes read of the checkpoint.
"""

import json
import os
import sys

port, count, number, *sizes = map(int, sys.argv[1:])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // count}"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from minimax_jax import MiniMaxM3ForCausalLM  # noqa: E402
from minimax_jax.checkpoint.files import CheckpointFiles  # noqa: E402
from minimax_jax.parallel import ParallelConfig  # noqa: E402

jax.distributed.initialize(f"127.0.0.1:{port}", count, number, initialization_timeout=60)
whole, read = CheckpointFiles.read, []


def counted(self, name, index=None):
    view = whole(self, name, index)
    read.append(view.nbytes)
    return view


CheckpointFiles.read = counted
model = MiniMaxM3ForCausalLM.from_pretrained("tiny", "float32", parallel=ParallelConfig(*sizes))
prompts = [list(range(5, 45)), list(range(300, 310))]
tokens = model.generate(prompts, max_new_tokens=3, do_sample=False)
print(json.dumps({"tokens": np.asarray(tokens).tolist(), "read": sum(read)}), flush=True)
