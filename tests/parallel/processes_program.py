"""One of several processes that generate together; scripts/launch.py gives the last arguments.

    python processes_program.py '{"model": DIR, "layouts": [[4, 4, 1]], ...}' --cpu-devices 2 --coordinator ...

Writes, in each process, OUT/NUMBER.json: by layout tokens, bytes read of the checkpoint, and how this process's part of
the logits and of the selected blocks differs from one device's (in the file "expected").
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from selected_blocks import other_rows, recorded_blocks

from minimax_jax import LLM, MiniMaxM3ForCausalLM, SamplingParams
from minimax_jax.buckets import bucket
from minimax_jax.checkpoint.files import CheckpointFiles
from minimax_jax.parallel import ParallelConfig, ProcessesConfig, start_processes

parser = argparse.ArgumentParser()
parser.add_argument("plan", type=json.loads)
parser.add_argument("--cpu-devices", type=int)
parser.add_argument("--coordinator")
parser.add_argument("--num-processes", type=int)
parser.add_argument("--process-id", type=int)
args = parser.parse_args()
plan = args.plan

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", args.cpu_devices)
processes = start_processes(
    ProcessesConfig(args.coordinator, args.num_processes, args.process_id, start_timeout=100, peer_timeout=60)
)
whole, read = CheckpointFiles.read, []


def counted(self, name, index=None):
    view = whole(self, name, index)
    read.append(view.nbytes)
    return view


def compare(model):
    """(largest difference of logits, rows of selected blocks that were compared, and that differ)."""
    lengths = [len(prompt) for prompt in plan["prompts"]]
    logits, found = blocks.during(lambda: model(plan["prompts"]).logits)
    off = [abs(np.asarray(shard.data) - expected["logits"][shard.index]).max() for shard in logits.addressable_shards]
    devices = enumerate(model.ranks.mesh.devices.flat)
    assert sorted(found) == [rank for rank, device in devices if device.process_index == processes.index]
    rows = bucket(-(-len(lengths) // model.ranks.groups))
    return [float(max(off)), *other_rows(expected["blocks"], found, model.ranks.layout, lengths, rows)]


CheckpointFiles.read = counted
expected = np.load(plan["expected"])
result = {"index": processes.index, "tokens": [], "read": [], "compared": []}
with recorded_blocks() as blocks:
    for sizes in plan["layouts"]:
        read.clear()
        model = MiniMaxM3ForCausalLM.from_pretrained(plan["model"], "float32", parallel=ParallelConfig(*sizes))
        result["read"].append(sum(read))
        result["compared"].append(compare(model))
        tokens = model.generate(plan["prompts"], max_new_tokens=plan["new"], do_sample=False, eos_token_id=-1)
        result["tokens"].append(np.asarray(tokens).tolist())
if plan["llm"]:  # two calls of more requests than run at once
    with LLM(plan["model"], dtype="float32", parallel=ParallelConfig(*plan["llm"]), **plan["shapes"]) as llm:
        params = SamplingParams(max_tokens=plan["new"], temperature=0, ignore_eos=True, detokenize=False)
        calls = [llm.generate(plan["prompts"], params, use_tqdm=False) for _ in range(2)]
    result["llm"] = [[output.outputs[0].token_ids for output in outputs] for outputs in calls]
# written at once, then shown: Gloo prints on standard output too
text, place = json.dumps(result), Path(plan["out"])
with tempfile.NamedTemporaryFile("w", dir=place, delete=False) as file:
    file.write(text)
os.replace(file.name, place / f"{processes.index}.json")
processes.close()
