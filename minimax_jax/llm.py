"""LLM: many requests at once on one model, with the calls that users of vLLM and TensorRT-LLM know."""

from __future__ import annotations

import asyncio
import itertools
import operator
import queue
import sys
import time
import warnings
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np

from minimax_jax.cache import cache_dtype
from minimax_jax.causal_lm import MiniMaxM3ForCausalLM
from minimax_jax.engine.build import Limits, build_core
from minimax_jax.engine.engine_config import CacheConfig, DecodeConfig, SegmentConfig, config_from
from minimax_jax.engine.engine_thread import EngineThread
from minimax_jax.engine.outputs import RequestOutput
from minimax_jax.engine.prompts import document_ids
from minimax_jax.engine.request import Request
from minimax_jax.engine.sampling_params import SamplingParams
from minimax_jax.engine.stats import EngineStats, engine_stats
from minimax_jax.integers import require_integer
from minimax_jax.parallel import ParallelConfig
from minimax_jax.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int]
_PROGRESS_DELAY = 2.0  # seconds; what is over sooner shows nothing


class LLM:
    """A model that serves many requests: `generate`, `generate_async`, `chat`. Close it, or use it in `with`.

    Calls from several threads share batches. All work on the device is done on a thread of its own.

    Over ranks of several processes (`minimax_jax.parallel.start_processes`) every process makes the same calls in the
    same order, from one thread; one call runs at a time, and all processes get its answers.

    Attributes:
      model: weights and tokenizer.
      max_seq_len: tokens that prompt and answer have room for.
    """

    def __init__(
        self,
        model: str | Path | MiniMaxM3ForCausalLM = "tiny",
        *,
        dtype: Any = "auto",
        quantization: str = "auto",
        tensor_parallel_size: int = 1,
        moe_expert_parallel_size: int | None = None,
        enable_attention_dp: bool = False,
        parallel: ParallelConfig | None = None,
        max_batch_size: int = 64,
        max_num_tokens: int = 8192,
        max_seq_len: int | None = None,
        cache_config: CacheConfig | Mapping[str, Any] | None = None,
        segment_config: SegmentConfig | Mapping[str, Any] | None = None,
        decode_config: DecodeConfig | Mapping[str, Any] | None = None,
        seed: int = 0,
        warm_up: bool | str | None = None,
        progress: bool = True,
    ):
        """Loads the model and sizes the caches.

        Args:
          model: a checkpoint directory, "tiny" for the embedded one, or a model that is loaded already.
          dtype, quantization: as `MiniMaxM3ForCausalLM.from_pretrained` takes them.
          tensor_parallel_size: devices that share heads; with `enable_attention_dp`, data ranks instead.
          moe_expert_parallel_size: devices that routed experts are dealt to; None for 1, with attention data
            parallelism for all.
          enable_attention_dp: whether each device attends for requests of its own.
          parallel: instead of these three, sizes as `from_pretrained` takes them.
          max_batch_size: sequences that run at once, on each data rank.
          max_num_tokens: of one step, on each data rank; at least `max_batch_size`.
          max_seq_len: tokens of prompt and answer; None for the model's. What the pages hold is a limit as well.
          cache_config, segment_config, decode_config: the config, or a dict of its fields.
          seed: where requests without a seed get theirs from.
          warm_up: whether the largest steps are compiled now; None for where they must run to measure memory. "all":
            steps of every shape, so that serving compiles none but the heads of penalties, biases and logprobs: give
            few buckets, of tokens in `segment_config`, of sequences and of pages in `decode_config`.
          progress: whether loads and warm-ups of more than two seconds show a bar on stderr.

        Raises:
          FileNotFoundError, ConfigError, CheckpointError, ParallelError: as `from_pretrained`.
          ValueError: for settings out of range or that do not fit each other.
        """
        cache = config_from("cache_config", CacheConfig, cache_config)
        segment = config_from("segment_config", SegmentConfig, segment_config)
        decode = config_from("decode_config", DecodeConfig, decode_config)
        max_batch_size = require_integer("max_batch_size", max_batch_size, 1)
        max_num_tokens = require_integer("max_num_tokens", max_num_tokens, 1)
        seed = require_integer("seed", seed, 0)
        if max_seq_len is not None:  # whose range is the model's
            max_seq_len = require_integer("max_seq_len", max_seq_len, 0)
        tensor_parallel_size = require_integer("tensor_parallel_size", tensor_parallel_size, 1)
        if moe_expert_parallel_size is not None:
            moe_expert_parallel_size = require_integer("moe_expert_parallel_size", moe_expert_parallel_size, 1)
        if max_num_tokens < max_batch_size:
            raise ValueError(
                f"max_num_tokens = {max_num_tokens}: must be at least max_batch_size = {max_batch_size}, a token for "
                "each sequence"
            )
        if not isinstance(enable_attention_dp, bool):
            raise ValueError(f"enable_attention_dp = {enable_attention_dp!r}: must be True or False")
        if parallel is not None and not isinstance(parallel, ParallelConfig):
            raise ValueError(f"parallel = {parallel!r}: must be a ParallelConfig or None")
        if warm_up not in (None, True, False, "all"):
            raise ValueError(f"warm_up = {warm_up!r}: must be None, True, False or 'all'")
        sizes = _parallel(tensor_parallel_size, moe_expert_parallel_size, enable_attention_dp)
        if parallel is not None and sizes.num_devices > 1:
            raise ValueError(
                "parallel: not allowed with tensor_parallel_size, moe_expert_parallel_size or enable_attention_dp"
            )
        sizes = sizes if parallel is None else parallel
        spread = None if sizes.num_devices == 1 else sizes
        if isinstance(model, MiniMaxM3ForCausalLM):
            if spread is not None:
                raise ValueError("tensor_parallel_size: must be 1 for a loaded model, which has its own layout")
            for name, option in (("dtype", dtype), ("quantization", quantization)):
                if not isinstance(option, str) or option != "auto":
                    raise ValueError(f"{name} = {option!r}: must be 'auto' for a loaded model, which has its own")
            self.model = model
        else:
            self.model = MiniMaxM3ForCausalLM.from_pretrained(
                model, dtype, parallel=spread, quantization=quantization, progress=progress
            )
        config = self.model.config
        longest = config.max_position_embeddings
        if max_seq_len is not None and not 2 <= max_seq_len <= longest:
            raise ValueError(
                f"max_seq_len = {max_seq_len}: must be within 2..{longest} (the model's max_position_embeddings)"
            )
        end_ids = self.model.generation_config.eos_token_id
        core = build_core(
            self.model.steps,
            self.model.leaves,
            config,
            Limits(max_batch_size, max_num_tokens, max_seq_len or longest),
            cache,
            segment,
            decode,
            dtype=cache_dtype(cache.dtype, self.model.dtype).name,
            end_ids=end_ids,
            warm_up=bool(warm_up) if warm_up != "all" else warm_up,
            progress=progress,
        )
        self.max_seq_len = min(max_seq_len or longest, core.schedulers[0].capacity)
        self._core, self._thread = core, EngineThread(core, lockstep=core.runner.spans_processes)
        self._arrivals, self._seeds = itertools.count(), np.random.default_rng(seed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's; FileNotFoundError if the model came with none."""
        return self.model.tokenizer

    def default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json asks for."""
        options = self.model.generation_config
        return SamplingParams(
            max_tokens=options.max_new_tokens or 256,
            temperature=options.temperature if options.do_sample else 0,
            top_p=options.top_p,
            top_k=options.top_k,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers prompts, all together in shared batches.

        Args:
          prompts: texts or lists of token ids, one or many. A text gets the document-start token in front, if the
            tokenizer has one.
          sampling_params: for all or one for each; None for `default_sampling_params`.
          use_tqdm: whether calls of more than two seconds show a bar on stderr.

        Returns:
          One output a prompt, in their order. A request that failed has its `error` and a warning is given; the
          others are not touched by it.

        Raises:
          TypeError, ValueError: if the arguments are no prompts or do not go together.
          EngineClosedError: after `close`.
        """
        if isinstance(prompts, Mapping) or not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")):
            raise TypeError(f"prompts: must be texts or lists of token ids, one or many, got {type(prompts).__name__}")
        single = isinstance(prompts, str) or (len(prompts) > 0 and not _is_prompt(prompts[0]))
        many: list[Any] = [prompts] if single else list(prompts)
        params = self._spread(sampling_params, len(many))
        return self._run([self._request(*pair) for pair in zip(many, params, strict=True)], use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        thinking_mode: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers a conversation, or several, through the checkpoint's chat template.

        Args:
          messages: of one conversation, or a list of such lists; see `minimax_jax.chat.validate_messages`.
          thinking_mode, tools: as the template takes them. `minimax_jax.assistant.parse_answer` takes the answer's text
            apart into reasoning, content and tool calls.

        Raises:
          ValueError: for what is no conversation, and as `generate`.
        """
        several = len(messages) > 0 and isinstance(messages[0], (list, tuple))
        conversations = list(messages) if several else [messages]
        params = self._spread(sampling_params, len(conversations))
        requests = []
        for conversation, own in zip(conversations, params, strict=True):
            text = self.tokenizer.apply_chat_template(
                conversation, thinking_mode=thinking_mode, tools=tools, tokenize=False
            )
            assert isinstance(text, str)
            requests.append(self._request(self.tokenizer.encode(text), own, text))
        return self._run(requests, use_tqdm=use_tqdm)

    async def generate_async(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yields the answer as it grows; the last one is finished.

        Whoever stops listening (`break`, cancellation, `aclose`) ends the request.

        Raises:
          RequestError, ValueError: what ended the request or kept it from beginning; ValueError also over ranks of
            several processes, which could not agree on when it ends.
        """
        if self._core.runner.spans_processes:
            raise ValueError("generate_async: must run in one process; `generate` and `chat` run in several")
        request = self._request(prompt, self._spread(sampling_params, 1)[0], streams=True)
        loop = asyncio.get_running_loop()
        newest: list[RequestOutput] = []  # one at most: a slow listener finds no heap of old ones
        arrived = asyncio.Event()

        def listen(changed: Request) -> None:
            newest[:] = [changed.output()]
            loop.call_soon_threadsafe(arrived.set)

        self._thread.submit([request], listen)
        finished = False
        try:
            while not finished:
                await arrived.wait()
                arrived.clear()  # before the look: what comes after it is waited for again
                if not newest:  # this one was seen before its own call to `set` came
                    continue
                output = newest.pop()
                finished = output.finished
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            if not finished:
                self._thread.abort(request)

    def stats(self) -> EngineStats:
        """What the engine did and holds."""
        return engine_stats(self._core, self.model.steps.traces)

    def close(self) -> None:
        """Ends what runs and frees the caches; a second call does nothing."""
        self._thread.close()
        self._core.runner.pool.release()

    def _spread(self, params: Any, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        each = list(params)
        if len(each) != count or not all(isinstance(own, SamplingParams) for own in each):
            raise ValueError(f"sampling_params: must be one SamplingParams, or {count}, one for each prompt")
        return each

    def _request(
        self, prompt: Any, params: SamplingParams, text: str | None = None, *, streams: bool = False
    ) -> Request:
        tokenizer: Tokenizer | None = None
        try:
            tokenizer = self.tokenizer
        except FileNotFoundError:
            if isinstance(prompt, str):
                raise
        error: Exception | None = None
        ids: list[int] = []
        if isinstance(prompt, str):
            assert tokenizer is not None
            text = prompt
            try:
                ids = document_ids(tokenizer, prompt, self.model.config)
            except ValueError as problem:
                error = problem
        else:
            try:
                ids = [operator.index(token) for token in prompt]
            except TypeError as problem:
                error = ValueError(f"the prompt must be a text or a list of token ids: {problem}")
        arrival = next(self._arrivals)
        seed = int(self._seeds.integers(2**32)) if params.seed is None else params.seed
        return Request(
            str(arrival),
            text,
            ids,
            params,
            arrival=arrival,
            seed=seed,
            max_seq_len=self.max_seq_len,
            vocab_size=self.model.config.vocab_size,
            tokenizer=tokenizer,
            error=error,
            streams=streams,
        )

    def _run(self, requests: list[Request], *, use_tqdm: bool) -> list[RequestOutput]:
        done: queue.SimpleQueue[Request] = queue.SimpleQueue()

        def listen(changed: Request) -> None:
            if changed.finished:
                done.put(changed)

        waiting = {request.request_id for request in requests}
        bar = _Bar(len(requests), shown=use_tqdm)
        try:
            self._thread.submit(requests, listen)
            while waiting:
                try:
                    request = done.get(timeout=0.5)  # so that the bar appears, and Ctrl-C gets through everywhere
                except queue.Empty:
                    bar.update(0, 0)
                    continue
                if request.request_id in waiting:
                    waiting.remove(request.request_id)
                    bar.update(1, sum(len(sequence.output) for sequence in request.sequences))
        except BaseException:
            for request in requests:
                if not request.finished:
                    self._thread.abort(request)
            raise
        finally:
            bar.close()
        outputs = [request.output() for request in requests]
        failed = [output for output in outputs if output.error is not None]
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(outputs)} requests failed, the first: {failed[0].error}", stacklevel=3
            )
        return outputs


class _Bar:
    """Progress over requests, from two seconds on."""

    def __init__(self, total: int, *, shown: bool):
        self._total, self._shown = total, shown
        self._start, self._tokens, self._done = time.monotonic(), 0, 0
        self._bar: Any = None

    def update(self, requests: int, tokens: int) -> None:
        self._done += requests
        self._tokens += tokens
        seconds = time.monotonic() - self._start
        if self._bar is None and self._shown and seconds > _PROGRESS_DELAY:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit="request", file=sys.stderr, dynamic_ncols=True)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._tokens / seconds:.0f} new tokens/s", refresh=False)
            self._bar.update(self._done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or hasattr(value, "__len__")


def _parallel(tensor: int, expert: int | None, attention_dp: bool) -> ParallelConfig:
    if expert is None:
        expert = tensor if attention_dp else 1
    return ParallelConfig(1 if attention_dp else tensor, expert, tensor if attention_dp else 1)
