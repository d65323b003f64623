"""`minimax-jax generate`: from a prompt to streamed text or one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimax_jax.chat import THINK_CLOSE, THINK_OPEN, ThinkingParser, split_thinking
from minimax_jax.cli_errors import INTERRUPTED
from minimax_jax.cli_parallel import joined
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.prompts import document_ids
from minimax_jax.paths import model_directory
from minimax_jax.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    import numpy as np

    from minimax_jax.causal_lm import MiniMaxM3ForCausalLM
    from minimax_jax.parallel import ParallelConfig, Processes

OK = 0
_NO_EOS = -1  # what `generate` takes for "no token ends a row"


def run_generate(args: argparse.Namespace) -> int:
    """Runs the subcommand and returns the exit code.

    The prompt is read and encoded before the weights load: a mistake in it shows at once.

    Raises:
      ValueError, OSError, MemoryError: for whatever the user can put right; the message says how.
    """
    _require_chat(args)
    with joined(args) as (processes, parallel):
        return _run(args, parallel, processes)


def _run(args: argparse.Namespace, parallel: ParallelConfig, processes: Processes) -> int:
    directory = model_directory(args.model)
    config = MiniMaxM3Config.from_pretrained(directory)
    tokenizer = Tokenizer.from_pretrained(directory)
    prompt, ids = processes.from_first(lambda: _prompt_ids(args, tokenizer, config))

    started = time.perf_counter()
    model = _load(args, parallel, processes)
    load_seconds = time.perf_counter() - started
    stream = TextStream(tokenizer)
    pieces = AnswerText(stream, args.thinking_mode) if args.chat else stream
    run = Run(len(ids), pieces if processes.is_first and not args.json else None)
    interrupted = False
    try:
        _generate(model, ids, args, run)
    except KeyboardInterrupt:
        interrupted = True
    run.finish()
    if processes.is_first:
        _print_end(args, model, prompt, ids, run, tokenizer, load_seconds, interrupted=interrupted)
    if interrupted and processes.count > 1:  # the others may be a step ahead, and wait for this process
        processes.leave(None, INTERRUPTED)
    return INTERRUPTED if interrupted else OK


def _prompt_ids(args: argparse.Namespace, tokenizer: Tokenizer, config: MiniMaxM3Config) -> tuple[str, list[int]]:
    prompt, source = _read_prompt(args)
    try:
        ids = chat_ids(tokenizer, prompt, args) if args.chat else document_ids(tokenizer, prompt, config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    _require_room(ids, args.max_new_tokens, config, source)
    return prompt, ids


def _print_end(
    args: argparse.Namespace,
    model: MiniMaxM3ForCausalLM,
    prompt: str,
    ids: list[int],
    run: Run,
    tokenizer: Tokenizer,
    load_seconds: float,
    *,
    interrupted: bool,
) -> None:
    eos = () if args.ignore_eos else model.generation_config.eos_token_id
    ended = bool(run.token_ids) and run.token_ids[-1] in eos
    reason = "interrupted" if interrupted else "stop" if ended else "length"
    if args.json:
        print(json.dumps(_result(args, prompt, ids, run, reason, tokenizer, load_seconds), indent=2), flush=True)
    else:
        print(flush=True)
        print(run.statistics(), file=sys.stderr)


def chat_ids(tokenizer: Tokenizer, text: str, args: argparse.Namespace) -> list[int]:
    """The ids of a conversation that asks for the answer to `text`."""
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = [*system, {"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(messages, thinking_mode=args.thinking_mode)
    assert isinstance(ids, list)
    return ids


class AnswerText:
    """A `TextStream` for answers; reasoning stands between its markers whatever mode the prompt was in.

    A bare closing marker, with which an answer without reasoning begins, is left out.
    """

    def __init__(self, stream: TextStream, thinking_mode: str | None):
        """`thinking_mode` as the prompt was rendered with."""
        self._stream = stream
        self._parser = ThinkingParser(thinking_mode)
        self._open = False

    def push(self, token_id: int) -> str:
        """The text that one id completed."""
        return self._mark(*self._parser.push(self._stream.push(token_id)))

    def finish(self) -> str:
        """What was held back."""
        return self._mark(*self._parser.push(self._stream.finish())) + self._mark(*self._parser.finish())

    def _mark(self, reasoning: str, content: str) -> str:
        if reasoning and not self._open:
            self._open = True
            reasoning = THINK_OPEN + reasoning
        if self._open and not self._parser.in_reasoning:
            self._open = False
            reasoning += THINK_CLOSE
        return reasoning + content


class Run:
    """A streamer for `generate` that keeps the new ids and when they came, and prints their text if `pieces` is given.

    Attributes:
      token_ids: the new ids so far.
    """

    def __init__(self, prompt_tokens: int, pieces: TextStream | AnswerText | None):
        """Starts the clock."""
        self.prompt_tokens = prompt_tokens
        self.token_ids: list[int] = []
        self._pieces = pieces
        self._prompt_seen = self._notice = False
        self._start = self._first = self._second = self._last = time.perf_counter()

    def put(self, value: np.ndarray) -> None:
        """Takes the prompt, then one new token a call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            if self._pieces is not None and sys.stderr.isatty():  # seconds pass, and somebody may be watching
                print("Compiling ...", end="\r", file=sys.stderr, flush=True)
                self._notice = True
            return
        if self._notice:
            self._clear_notice()
        self._last = time.perf_counter()
        if not self.token_ids:
            self._first = self._last
        self.token_ids.append(int(value[0]))
        if len(self.token_ids) == 2:
            self._second = self._last
        if self._pieces is not None:
            _print_piece(self._pieces.push(self.token_ids[-1]))

    def end(self) -> None:
        """The protocol's end; `finish` does the work, after an interruption too."""

    def _clear_notice(self) -> None:
        print("\x1b[K", end="", file=sys.stderr, flush=True)
        self._notice = False

    def finish(self) -> None:
        """Prints what was held back."""
        if self._notice:
            self._clear_notice()
        if self._pieces is not None:
            _print_piece(self._pieces.finish())

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds, None without a token."""
        return self._first - self._start if self.token_ids else None

    @property
    def total_seconds(self) -> float:
        """Seconds to the last token."""
        return self._last - self._start

    @property
    def tokens_per_second(self) -> float | None:
        """Rate after the second token, which waits for the decode step to compile; None for fewer than three."""
        span = self._last - self._second
        return (len(self.token_ids) - 2) / span if len(self.token_ids) > 2 and span > 0 else None

    def statistics(self) -> str:
        """The last line: counts, time to first token, rate."""
        first, rate = self.time_to_first_token, self.tokens_per_second
        parts = [_count(self.prompt_tokens, "prompt token"), _count(len(self.token_ids), "new token")]
        parts.append("no first token" if first is None else f"{first:.2f} s to first token")
        parts.append("no rate" if rate is None else f"{rate:.1f} tokens/s")
        return ", ".join(parts)


def _print_piece(text: str) -> None:
    if text:
        print(text, end="", flush=True)


def _require_chat(args: argparse.Namespace) -> None:
    for option, value in (("--system", args.system), ("--thinking-mode", args.thinking_mode)):
        if value is not None and not args.chat:
            raise ValueError(f"{option}: only allowed with --chat")


def _read_prompt(args: argparse.Namespace) -> tuple[str, str]:
    """The prompt, and what errors call the place it came from."""
    if args.prompt is not None:
        text, source = args.prompt, "--prompt"
    else:
        source = "standard input" if args.prompt_file is None else f"--prompt-file {args.prompt_file}"
        try:
            text = _read_stdin() if args.prompt_file is None else Path(args.prompt_file).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: must be UTF-8 text, and is not at byte {error.start}") from None
        except OSError as error:
            raise ValueError(f"{source}: {error.strerror or error}") from None
        if text.endswith("\n"):  # editors and `echo` end a text with a line break that nobody meant
            text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError(f"{source}: the prompt is empty: give at least one character")
    return text, source


def _read_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt, --prompt-file, or text on standard input")
    return sys.stdin.read()


def _require_room(ids: list[int], new_tokens: int | None, config: MiniMaxM3Config, source: str) -> None:
    most = config.max_position_embeddings
    if len(ids) >= most:
        raise ValueError(
            f"{source}: the prompt has {len(ids)} tokens: must be at most {most - 1}, which leaves room for one more "
            f"(max_position_embeddings = {most})"
        )
    if new_tokens is not None and len(ids) + new_tokens > most:
        raise ValueError(
            f"--max-new-tokens = {new_tokens}: must be at most {most - len(ids)} after a prompt of {len(ids)} tokens "
            f"(max_position_embeddings = {most})"
        )


def _load(args: argparse.Namespace, parallel: ParallelConfig, processes: Processes) -> MiniMaxM3ForCausalLM:
    from minimax_jax import MiniMaxM3ForCausalLM

    _require_device()
    options: dict[str, Any] = {"quantization": args.quantization}
    if parallel.num_devices > 1:
        options["parallel"] = parallel
    if not processes.is_first:
        options["progress"] = False
    with _memory_errors():
        return MiniMaxM3ForCausalLM.from_pretrained(args.model, dtype=args.dtype, **options)


def _require_device() -> None:
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names a platform that this machine lacks
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"JAX found no device{f': {reason}' if reason else ''}; see JAX_PLATFORMS") from None


def _generate(model: MiniMaxM3ForCausalLM, ids: list[int], args: argparse.Namespace, run: Run) -> None:
    import numpy as np

    options: dict[str, Any] = {"top_p": args.top_p, "top_k": args.top_k}
    if args.temperature == 0:
        options = {"do_sample": False}
    elif any(value is not None for value in (args.temperature, args.top_p, args.top_k)):
        options |= {"do_sample": True, "temperature": args.temperature}
    if args.ignore_eos:
        options["eos_token_id"] = _NO_EOS
    options |= {"execution": args.execution, "cache_dtype": args.cache_dtype}
    with _memory_errors():
        model.generate(
            np.array([ids], np.int32), max_new_tokens=args.max_new_tokens, seed=args.seed, streamer=run, **options
        )


@contextmanager
def _memory_errors() -> Iterator[None]:
    """A device that is full raises MemoryError in here: users can do something about it."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(f"not enough device memory: {str(error).splitlines()[0]}") from None


def _result(
    args: argparse.Namespace,
    prompt: str,
    ids: list[int],
    run: Run,
    reason: str,
    tokenizer: Tokenizer,
    load_seconds: float,
) -> dict[str, Any]:
    text = tokenizer.decode(run.token_ids)
    answer: dict[str, Any] = {}
    if args.chat:
        answer["reasoning"], answer["content"] = split_thinking(text, args.thinking_mode)
    return {
        "model": args.model,
        "prompt": prompt,
        "text": text,
        **answer,
        "prompt_token_ids": ids,
        "token_ids": run.token_ids,
        "finish_reason": reason,
        "prompt_tokens": run.prompt_tokens,
        "new_tokens": len(run.token_ids),
        "timings": {
            "load_seconds": load_seconds,
            "time_to_first_token_seconds": run.time_to_first_token,
            "total_seconds": run.total_seconds,
            "tokens_per_second": run.tokens_per_second,
        },
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
