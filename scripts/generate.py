#!/usr/bin/env python3
"""Answers many prompts at once with `minimax_jax.LLM`.

  python scripts/generate.py --prompt "The kernel" --prompt "And it came to pass, that" --max-tokens 40
  python scripts/generate.py --prompt-file prompts.txt --temperature 0 --json > answers.jsonl
  python scripts/generate.py --chat --thinking-mode disabled --prompt "Who are you?"

Prompts come from --prompt (any number), or from a file with one on each line. Answers come in the prompts' order, as
text or as one JSON object a line. `minimax-jax generate` streams one answer instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from minimax_jax import LLM, SamplingParams  # noqa: E402
from minimax_jax.assistant import parse_answer  # noqa: E402
from minimax_jax.cli_arguments import add_cache_dtype, add_quantization  # noqa: E402
from minimax_jax.cli_parallel import add_parallel, joined  # noqa: E402
from minimax_jax.engine.outputs import RequestOutput  # noqa: E402
from minimax_jax.parallel import ParallelConfig  # noqa: E402
from minimax_jax.prompt_lines import read_lines  # noqa: E402


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", help="checkpoint directory; tiny: the embedded one (default: tiny)")
    add("--prompt", action="append", default=[], help="a prompt; may be repeated")
    add("--prompt-file", type=Path, help="UTF-8 file with one prompt on each line")
    add("--chat", action="store_true", help="prompts are users' messages: apply the chat template (default: off)")
    add("--thinking-mode", choices=("enabled", "disabled", "adaptive"), help="with --chat (default: the template's)")
    add("--n", type=int, default=1, help="answers to each prompt (default: 1)")
    add("--max-tokens", type=int, default=64, help="new tokens of an answer (default: 64)")
    add("--temperature", type=float, help="0 is greedy (default: the checkpoint's)")
    add("--top-p", type=float, help="(default: the checkpoint's)")
    add("--top-k", type=int, help="0 for all (default: the checkpoint's)")
    add("--stop", action="append", default=[], help="a string that ends an answer; may be repeated")
    add("--seed", type=int, help="of every request's draws (default: another one each)")
    add("--max-batch-size", type=int, default=64, help="sequences at once (default: 64)")
    add_cache_dtype(parser)
    add_quantization(parser)
    add("--json", action="store_true", help="one JSON object a line (default: text)")
    add_parallel(parser)
    return parser.parse_args()


def prompts_of(args: argparse.Namespace) -> list[str]:
    """All prompts, in order."""
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        prompts += [line for _, line in read_lines(args.prompt_file)]
    if not prompts:
        raise ValueError("no prompt: give --prompt or --prompt-file")
    return prompts


def sampling(llm: LLM, args: argparse.Namespace) -> SamplingParams:
    """The checkpoint's own parameters, with what was given in their place."""
    default = llm.default_sampling_params()
    return SamplingParams(
        n=args.n,
        max_tokens=args.max_tokens,
        temperature=default.temperature if args.temperature is None else args.temperature,
        top_p=default.top_p if args.top_p is None else args.top_p,
        top_k=default.top_k if args.top_k is None else args.top_k,
        stop=args.stop,
        seed=args.seed,
    )


def show(prompt: str, output: RequestOutput, args: argparse.Namespace) -> None:
    """Prints the answers to one prompt."""
    answers = []
    for answer in output.outputs:
        entry = {"text": answer.text, "finish_reason": answer.finish_reason, "new_tokens": len(answer.token_ids)}
        if args.chat:
            parts = parse_answer(answer.text, args.thinking_mode)
            entry |= {"reasoning": parts.reasoning, "content": parts.content}
        answers.append(entry)
    error = None if output.error is None else str(output.error)
    if args.json:
        print(json.dumps({"prompt": prompt, "answers": answers, "error": error}, ensure_ascii=False))
        return
    for entry in answers:
        print(f"{prompt}\n  -> {entry.get('content', entry['text'])}\n")
    if error:
        print(f"{prompt}\n  failed: {error}\n", file=sys.stderr)


def answer(
    prompts: list[str], args: argparse.Namespace, parallel: ParallelConfig, *, first: bool
) -> list[RequestOutput]:
    """All answers; `first` is whether this process shows progress."""
    cache = {"dtype": args.cache_dtype}
    with LLM(
        args.model,
        quantization=args.quantization,
        max_batch_size=args.max_batch_size,
        cache_config=cache,
        parallel=parallel,
        progress=first,
    ) as llm:
        params = sampling(llm, args)
        if args.chat:
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
            return llm.chat(messages, params, thinking_mode=args.thinking_mode, use_tqdm=first)
        return llm.generate(prompts, params, use_tqdm=first)


def main() -> int:
    """Runs the script."""
    args = arguments()
    try:
        with joined(args) as (processes, parallel):
            prompts = processes.from_first(lambda: prompts_of(args))
            outputs = answer(prompts, args, parallel, first=processes.is_first)
            if processes.is_first:
                for prompt, output in zip(prompts, outputs, strict=True):
                    show(prompt, output, args)
    except (ValueError, OSError) as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngenerate.py: interrupted", file=sys.stderr)
        return 130
    return 1 if any(output.error is not None for output in outputs) else 0


if __name__ == "__main__":
    sys.exit(main())
