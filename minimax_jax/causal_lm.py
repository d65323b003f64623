"""MiniMaxM3ForCausalLM: the model as users hold it, with weights, tokenizer and generation."""

from __future__ import annotations

import dataclasses
import functools
import operator
import shutil
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minimax_jax.checkpoint import load_state, save_state
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.execution import check_execution
from minimax_jax.engine.full_forward import FullForward
from minimax_jax.engine.generation import generate_tokens
from minimax_jax.engine.generation_config import GenerationConfig
from minimax_jax.engine.prompts import Prompts, is_torch_tensor, read_prompts
from minimax_jax.engine.steps import Steps
from minimax_jax.model import MiniMaxM3, abstract_model, split_model
from minimax_jax.parallel import ParallelConfig, Ranks
from minimax_jax.paths import model_directory
from minimax_jax.tokenizer import Tokenizer

_DEFAULT_NEW_TOKENS = 256
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclasses.dataclass(frozen=True)
class CausalLMOutput:
    """What a forward pass gives.

    Attributes:
      logits: [R, L, V] float32; zeros where the attention mask is 0.
    """

    logits: Any


class Streamer(Protocol):
    """Receives tokens while they are generated; transformers' streamers fit."""

    def put(self, value: np.ndarray) -> None:
        """First the prompts [R, L], then each step's new tokens [R]."""

    def end(self) -> None:
        """No more tokens will come."""


class MiniMaxM3ForCausalLM:
    """A MiniMax-M3 language model: `from_pretrained`, call for logits, `generate`.

    Attributes:
      config: the architecture.
      generation_config: defaults of `generate`.
      dtype: of matrices and caches.
      ranks: what the model is spread over, None for one device.
    """

    def __init__(
        self,
        config: MiniMaxM3Config,
        state: dict[str, jax.Array],
        *,
        generation_config: GenerationConfig | None = None,
        directory: Path | None = None,
        ranks: Ranks | None = None,
    ):
        """Takes a model apart that is already in memory; see `from_pretrained` and `from_config`.

        Args:
          state: weights by dotted name, as `minimax_jax.checkpoint.load_state` gives them.
          directory: where tokenizer files lie, if anywhere.
          ranks: what the model is spread over; the weights are then global arrays (`Ranks.put`, `load_state`).

        Raises:
          ValueError: if a weight is missing, unknown or of the wrong shape.
        """
        self.config = config
        self.dtype = state["embed_tokens"].dtype
        graphdef, expected = split_model(abstract_model(config, self.dtype))
        wrong = sorted(set(expected) ^ set(state))
        shapes = {name: struct.shape for name, struct in expected.items()}
        if ranks is not None:
            graphdef, _ = split_model(abstract_model(ranks.layout.local_config, self.dtype))
            shapes = {name: ranks.global_shape(name, shape) for name, shape in shapes.items()}
        wrong += [name for name in expected if name in state and state[name].shape != shapes[name]]
        if wrong:
            raise ValueError(f"state does not fit the config at {', '.join(wrong[:5])} ({len(wrong)} in all)")
        self.generation_config = generation_config or GenerationConfig(eos_token_id=config.eos_token_ids)
        self._names = tuple(expected)
        self._leaves = [state[name] for name in self._names]
        self._graphdef = graphdef
        self._directory = directory
        self.ranks = ranks
        local = config if ranks is None else ranks.layout.local_config
        self._steps = Steps(local, graphdef, self._names, ranks)
        self._forward = FullForward(local, graphdef, self._names, ranks)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: Any = "auto",
        *,
        device: Any = None,
        parallel: ParallelConfig | None = None,
        progress: bool = True,
    ) -> MiniMaxM3ForCausalLM:
        """Loads a checkpoint directory in the Hugging Face format; "tiny" is the embedded one.

        Args:
          directory: with config.json and safetensors, in the vendor's or transformers' names, BF16 or MXFP8
            (dequantised while loading).
          dtype: "bfloat16" or "float32" (by name, or NumPy's, JAX's or torch's type), or "auto": bfloat16 on an
            accelerator, float32 on a CPU.
          device: a jax device or sharding; the default device if None.
          parallel: sizes to spread the model over JAX's devices with; each process reads only what its devices need.
          progress: whether loads of more than two seconds show a bar on stderr.

        Raises:
          FileNotFoundError: no such directory or config.json.
          ConfigError, CheckpointError: what the files hold cannot be loaded; nothing was.
          ValueError: for another dtype, or both a device and a parallel layout.
          ParallelError: if the model cannot be spread so.
        """
        if device is not None and parallel is not None:
            raise ValueError("device and parallel: give one of them")
        path = model_directory(directory)
        config = MiniMaxM3Config.from_pretrained(path)
        generation_config = GenerationConfig.from_pretrained(path, config.eos_token_ids)
        generation_config.check_vocabulary(config.vocab_size)
        ranks = None if parallel is None else Ranks(config, parallel)
        wanted = _resolve_dtype(dtype, device)
        state = load_state(path, config, wanted, device=device, progress=progress, ranks=ranks)
        return cls(config, state, generation_config=generation_config, directory=path, ranks=ranks)

    @classmethod
    def from_config(
        cls,
        config: MiniMaxM3Config,
        dtype: str = "float32",
        seed: int = 0,
        *,
        parallel: ParallelConfig | None = None,
    ) -> MiniMaxM3ForCausalLM:
        """A model with random weights, the same for every `parallel` layout (made on one device, then spread)."""
        ranks = None if parallel is None else Ranks(config, parallel)
        _, state = split_model(MiniMaxM3(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed)))
        if ranks is not None:
            state = {name: ranks.put(name, array) for name, array in state.items()}
        return cls(config, state, ranks=ranks)

    def save_pretrained(self, directory: str | Path, *, style: str = "transformers") -> None:
        """Writes config, weights, generation config and tokenizer files.

        The text model as it is in memory: vision tensors of a checkpoint it came from are not part of it, and
        MXFP8 weights were dequantised.

        Args:
          style: "transformers" (what `MiniMaxM3VLForCausalLM.from_pretrained` loads) or "vendor".
        """
        target = Path(directory).expanduser()
        save_state(self.state(), self.config, target, style=style)
        self.generation_config.write(target)
        if self._directory is not None:
            for name in _TEXT_FILES:
                source = self._directory / name
                if source.is_file() and source.resolve() != (target / name).resolve():
                    shutil.copyfile(source, target / name)

    def state(self) -> dict[str, Any]:
        """Weights by dotted name, matrices [in, out]; of a parallel model copies on the host, as NumPy arrays."""
        if (ranks := self.ranks) is not None:
            return {name: ranks.whole(name, leaf) for name, leaf in zip(self._names, self._leaves, strict=True)}
        return dict(zip(self._names, self._leaves, strict=True))

    def num_parameters(self) -> int:
        """Parameters of the text model, each counted once."""
        _, shapes = split_model(abstract_model(self.config, self.dtype))
        return sum(shape.size for shape in shapes.values())

    @property
    def steps(self) -> Steps:
        """The compiled steps, for engines that run them."""
        return self._steps

    @property
    def leaves(self) -> list[jax.Array]:
        """The weights, in the order in which `steps` takes them."""
        return self._leaves

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
          FileNotFoundError: if the model came with none.
        """
        if self._directory is None:
            raise FileNotFoundError("this model was not loaded from a directory, so it has no tokenizer")
        return Tokenizer.from_pretrained(self._directory)

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> CausalLMOutput:
        """Logits of every token, without a cache.

        Args:
          input_ids: [R, L] or [L] ids: NumPy, JAX, torch, or lists (of different lengths, if need be).
          attention_mask: of the same shape, 0 on padding, which may stand on either side.

        Returns:
          `.logits`: torch if the ids were, else JAX.

        Raises:
          ValueError: for an empty or too long prompt, ids outside the vocabulary, a mask that does not fit.
        """
        prompts = self._read(input_ids, attention_mask)
        flat = self._forward(self._leaves, prompts.tokens)
        if prompts.kept.all():
            logits = flat.reshape(*prompts.kept.shape, -1)
        else:
            logits = jnp.zeros((*prompts.kept.shape, self.config.vocab_size), flat.dtype)
            logits = logits.at[np.nonzero(prompts.kept)].set(flat)
        return CausalLMOutput(_like(input_ids, logits))

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        eos_token_id: int | list[int] | None = None,
        streamer: Streamer | None = None,
        execution: str = "auto",
    ) -> Any:
        """Continues prompts until each has met an end-of-text token or `max_new_tokens` are written.

        Options that are None come from `generation_config`. Row r's random draws depend on the seed, r and
        the position alone.

        Args:
          input_ids, attention_mask: as in a call.
          max_new_tokens: None for 256, or what room there is; prompt and new tokens must fit
            `max_position_embeddings`.
          eos_token_id: ids that end a row; -1 for none.
          streamer: receives the tokens as they come.
          execution: "segmented" runs prompts as compiled segments around host-side attention, "whole" as one
            executable, "eager" everything as segments at their exact sizes, for comparison; "auto" takes the
            fastest. Tokens are the same up to rounding.

        Returns:
          [R, L + new] ids: the prompts as given, then the new tokens; a row that ended early, and prompts of
          different lengths, are filled with the pad token (by default the first end-of-text id). torch if the
          ids were, else JAX.

        Raises:
          ValueError: for options out of range, and as in a call.
        """
        options = self.generation_config.override(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            eos_token_id=eos_token_id,
        )
        options.check_vocabulary(self.config.vocab_size)
        if isinstance(seed, bool) or not 0 <= (seed := operator.index(seed)) < 2**32:
            raise ValueError(f"seed = {seed!r}: must be an integer within 0..{2**32 - 1}")
        pad = options.pad
        prompts = self._read(input_ids, attention_mask, pad)
        longest = max(len(tokens) for tokens in prompts.tokens)
        budget = self._budget(options.max_new_tokens, longest, asked=max_new_tokens is not None)
        ends = np.array(options.eos_token_id, np.int32)
        steps = generate_tokens(
            self._steps,
            self._leaves,
            self.config,
            prompts.tokens,
            options,
            max_new_tokens=budget,
            seed=seed,
            cache_dtype=self.dtype,
            execution=check_execution(execution),
        )
        columns, ended = [], np.zeros(len(prompts.tokens), bool)
        try:
            if streamer is not None:
                streamer.put(prompts.padded)
            for tokens in steps:
                tokens = np.where(ended, pad, tokens).astype(np.int32)
                columns.append(tokens)
                if streamer is not None:
                    streamer.put(tokens)
                ended |= np.isin(tokens, ends)
                if ended.all():
                    break
        finally:
            if streamer is not None:
                streamer.end()  # a reader in another thread must not wait for ever
        return _like(input_ids, jnp.asarray(np.concatenate([prompts.padded, np.stack(columns, axis=1)], axis=1)))

    def _read(self, input_ids: Any, attention_mask: Any, pad: int = 0) -> Prompts:
        return read_prompts(
            input_ids,
            attention_mask,
            vocab_size=self.config.vocab_size,
            max_len=self.config.max_position_embeddings,
            pad=pad,
        )

    def _budget(self, max_new_tokens: int | None, longest: int, *, asked: bool) -> int:
        """New tokens to write; a default is cut to the room there is, a request that does not fit is refused."""
        limit = self.config.max_position_embeddings
        room = limit - longest
        if room < 1:
            raise ValueError(
                f"input_ids has {longest} tokens: generation needs at least one of "
                f"max_position_embeddings = {limit} to be free"
            )
        if not asked or max_new_tokens is None:
            return min(max_new_tokens or _DEFAULT_NEW_TOKENS, room)
        if max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens = {max_new_tokens}: at most {room} fit after a prompt of {longest} tokens "
                f"(max_position_embeddings = {limit})"
            )
        return max_new_tokens


def _resolve_dtype(dtype: Any, device: Any) -> str:
    """A dtype in any library's spelling as a name that `load_state` takes; "auto" looks at the device."""
    if isinstance(dtype, str) and dtype == "auto":
        devices = getattr(device, "device_set", None)
        target = next(iter(devices)) if devices else device
        platform = jax.default_backend() if target is None else target.platform
        return "float32" if platform == "cpu" else "bfloat16"
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, str) or "torch" in str(type(dtype)) else None
    try:
        name = name or jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in ("bfloat16", "float32"):
        raise ValueError(f"dtype = {dtype!r}: must be 'auto', 'bfloat16' or 'float32'")
    return name


def _like(given: Any, result: jax.Array) -> Any:
    """The result as a torch tensor, where the caller's tensor is, if torch came in."""
    if isinstance(given, (list, tuple)) and given:
        given = given[0]
    if not is_torch_tensor(given):
        return result
    import torch

    platform = next(iter(result.devices())).platform
    same_device = given.device.type == ("cuda" if platform == "gpu" else platform)
    tensor = torch.from_dlpack(result) if same_device else torch.from_numpy(np.array(result))
    return tensor.to(given.device, torch.int64 if tensor.dtype == torch.int32 else tensor.dtype)
