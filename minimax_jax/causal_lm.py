"""MiniMaxM3ForCausalLM: the model as users hold it, with weights, tokenizer and generation."""

from __future__ import annotations

import functools
import operator
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minimax_jax.cache import PastKeyValues
from minimax_jax.cache import cache_dtype as dtype_of_caches
from minimax_jax.checkpoint import load_state, save_state
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.execution import check_execution
from minimax_jax.engine.full_forward import FullForward
from minimax_jax.engine.generation import generate_tokens
from minimax_jax.engine.generation_config import GenerationConfig
from minimax_jax.engine.prompts import Prompts, is_torch_tensor, read_prompts
from minimax_jax.engine.steps import Steps
from minimax_jax.forward_arguments import kept_columns, new_columns, read_labels, read_positions, wanted_tokens
from minimax_jax.generation_arguments import generation_options
from minimax_jax.loss import causal_lm_loss, load_balancing_loss
from minimax_jax.model import MiniMaxM3, abstract_model, split_model
from minimax_jax.module_interface import ModuleInterface, dtype_name, find_device
from minimax_jax.outputs import CausalLMOutput
from minimax_jax.parallel import ParallelConfig, Ranks
from minimax_jax.paths import model_directory
from minimax_jax.tokenizer import Tokenizer
from minimax_kernels import Mxfp8

_DEFAULT_NEW_TOKENS = 256
_AUX_LOSS_COEF = 0.001  # transformers' default, where a config says nothing
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Streamer(Protocol):
    """Receives tokens while they are generated; transformers' streamers fit."""

    def put(self, value: np.ndarray) -> None:
        """First the prompts [R, L], then each step's new tokens [R]."""

    def end(self) -> None:
        """No more tokens will come."""


class MiniMaxM3ForCausalLM(ModuleInterface):
    """A MiniMax-M3 language model: `from_pretrained`, call for logits, `generate`; see docs/torch.md.

    Attributes:
      config: the architecture.
      generation_config: defaults of `generate`.
      ranks: what the model is spread over, None for one device.
    """

    def __init__(
        self,
        config: MiniMaxM3Config,
        state: Mapping[str, jax.Array | Mxfp8],
        *,
        generation_config: GenerationConfig | None = None,
        directory: Path | None = None,
        ranks: Ranks | None = None,
    ):
        """Takes a model apart that is already in memory; see `from_pretrained` and `from_config`.

        Args:
          state: weights by dotted name, as `minimax_jax.checkpoint.load_state` gives them; linears and routed experts
            may be `Mxfp8`.
          directory: where tokenizer files lie, if anywhere.
          ranks: what the model is spread over; the weights are then global arrays (`Ranks.put`, `load_state`).

        Raises:
          ValueError: if a weight is missing, unknown or of the wrong shape.
        """
        self.config = config
        embedding: Any = state["embed_tokens"]
        dtype = embedding.dtype
        graphdef, expected = split_model(abstract_model(config, dtype))
        wrong = sorted(set(expected) ^ set(state))
        shapes = {name: struct.shape for name, struct in expected.items()}
        if ranks is not None:
            graphdef, _ = split_model(abstract_model(ranks.layout.local_config, dtype))
            shapes = {name: ranks.global_shape(name, shape) for name, shape in shapes.items()}
        wrong += [name for name in expected if name in state and not _fits(state[name], shapes[name])]
        if wrong:
            raise ValueError(f"state does not fit the config at {', '.join(wrong[:5])} ({len(wrong)} in all)")
        self.generation_config = generation_config or GenerationConfig(eos_token_id=config.eos_token_ids)
        self._names = tuple(expected)
        self._leaves: list[Any] = [state[name] for name in self._names]
        self._graphdef = graphdef
        self._directory = directory
        self.ranks = ranks
        local = config if ranks is None else ranks.layout.local_config
        quantized = [name for name in self._names if isinstance(state[name], Mxfp8)]
        self._steps = Steps(local, graphdef, self._names, ranks, quantized=quantized)
        self._forward = FullForward(local, graphdef, self._names, ranks, quantized)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: Any = "auto",
        *,
        device: Any = None,
        device_map: Any = None,
        parallel: ParallelConfig | None = None,
        quantization: str = "auto",
        progress: bool = True,
    ) -> Self:
        """Loads a checkpoint directory in the Hugging Face format; "tiny" is the embedded one.

        Args:
          directory: with config.json and safetensors, in the vendor's or transformers' names, BF16 or MXFP8.
          dtype: "bfloat16" or "float32" (by name, or NumPy's, JAX's or torch's type), or "auto": bfloat16 on an
            accelerator, float32 on a CPU.
          device: a jax device or sharding, or a name such as "cuda:1"; the default device if None.
          device_map: transformers' name for the same; "auto" is the default device.
          parallel: sizes to spread the model over JAX's devices with; each process reads only what its devices need.
          quantization: "auto" keeps weights in 8 bits where the checkpoint is MXFP8; "none" multiplies them out while
            loading, which takes twice the memory in bfloat16.
          progress: whether loads of more than two seconds show a bar on stderr.

        Raises:
          FileNotFoundError: no such directory or config.json.
          ConfigError, CheckpointError: what the files hold cannot be loaded; nothing was.
          ValueError: for another dtype or quantization, a device that is not there, or two places for the weights.
          ParallelError: if the model cannot be spread so.
        """
        places = {"device": device, "device_map": device_map, "parallel": parallel}
        if len(given := [name for name, value in places.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of them")
        wished = device if device_map is None or device_map == "auto" else device_map
        device = None if wished is None else find_device(wished)
        path = model_directory(directory)
        config = MiniMaxM3Config.from_pretrained(path)
        generation_config = GenerationConfig.from_pretrained(path, config.eos_token_ids)
        generation_config.check_vocabulary(config.vocab_size)
        ranks = None if parallel is None else Ranks(config, parallel)
        wanted = _resolve_dtype(dtype, device)
        state = load_state(
            path, config, wanted, device=device, progress=progress, ranks=ranks, quantization=quantization
        )
        return cls(config, state, generation_config=generation_config, directory=path, ranks=ranks)

    @classmethod
    def from_config(
        cls,
        config: MiniMaxM3Config,
        dtype: str = "float32",
        seed: int = 0,
        *,
        parallel: ParallelConfig | None = None,
    ) -> Self:
        """A model with random weights, the same for every `parallel` layout (made on one device, then spread)."""
        ranks = None if parallel is None else Ranks(config, parallel)
        _, state = split_model(MiniMaxM3(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed)))
        if ranks is not None:
            state = {name: ranks.put(name, array) for name, array in state.items()}
        return cls(config, state, ranks=ranks)

    def save_pretrained(self, directory: str | Path, *, style: str = "transformers") -> None:
        """Writes config, weights, generation config and tokenizer files.

        The text model as it is in memory: vision tensors of a checkpoint it came from are not part of it. Weights in
        8 bits stay so in the vendor's style; transformers', which has none, gets them multiplied out.

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

    def num_parameters(self) -> int:
        """Parameters of the text model, each counted once."""
        _, shapes = split_model(abstract_model(self.config, self._dtype))
        return sum(shape.size for shape in shapes.values())

    @property
    def steps(self) -> Steps:
        """The compiled steps, for engines that run them."""
        return self._steps

    @property
    def leaves(self) -> list[Any]:
        """The weights, arrays or `Mxfp8`, in the order in which `steps` takes them."""
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

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: PastKeyValues | None = None,
        *,
        cache: PastKeyValues | None = None,
        labels: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_router_logits: bool | None = None,
        logits_to_keep: Any = 0,
        return_dict: bool = True,
    ) -> Any:
        """A forward pass, with transformers' arguments and results. Padding may stand on either side.

        Args:
          input_ids: [R, L] or [L] ids: NumPy, JAX, torch, or lists (of different lengths, if need be).
          attention_mask: of the same shape, 0 on padding; or [R, S + L], with the columns of the context first.
          position_ids: of the same shape, for the rotary embedding; None counts each row's tokens.
          past_key_values: the context that the ids continue, from an earlier call; it is extended in place.
          cache: transformers' newer name for the same.
          labels: of the same shape, ids or -100, for `.loss`: each token's logits against the next label; padding does
            not count.
          use_cache: whether to keep the context (`.past_key_values`); None: if one was given.
          output_hidden_states: whether to give these.
          output_router_logits: the same, and the auxiliary loss, which `.loss` then includes; None: as the config says.
          logits_to_keep: columns at the end to give logits of, 0 for all, or which columns, [K].
          return_dict: False for a tuple.

        Raises:
          ValueError: for an empty or too long prompt, ids outside the vocabulary, and arguments that do not fit.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values: give one of them")
        past = past_key_values if cache is None else cache
        if past is not None:
            self._check_past(past, use_cache)
        mask = new_columns(attention_mask, input_ids, past)
        prompts = self._read(input_ids, mask, least=1 if past is None else 0)
        kept = prompts.kept
        columns = kept_columns(logits_to_keep, kept.shape[1])
        if labels is not None:
            labels = read_labels(labels, kept, self.config.vocab_size)
            if not np.array_equal(columns, np.arange(kept.shape[1])):
                raise ValueError("labels and logits_to_keep: the loss needs the logits of all columns")
        positions = read_positions(position_ids, prompts, self.config.max_position_embeddings)
        if past is None and use_cache:
            past = self.empty_past_key_values(len(kept))
        elif past is not None:
            self._check_turn(past, kept)
        if output_router_logits is None:
            output_router_logits = self.config.extra.get("output_router_logits", False)
        wanted, order = wanted_tokens(kept, columns)
        out = self._forward(
            self._leaves,
            prompts.tokens,
            positions=positions,
            wanted=wanted,
            past=past,
            hidden_states=bool(output_hidden_states),
            router_logits=bool(output_router_logits),
        )
        if past is not None:
            past.append(kept)
        logits = _place_rows(out.logits, kept[:, columns], order)
        routers = tuple(_place_rows(rows, kept).reshape(kept.size, -1) for rows in out.router_logits)
        loss, aux_loss = self._losses(logits, labels, routers, kept)

        def given_out(array: Any) -> Any:
            return None if array is None else self._result(input_ids, array)

        result = CausalLMOutput(
            logits=given_out(logits),
            loss=given_out(loss),
            aux_loss=given_out(aux_loss),
            past_key_values=past,
            hidden_states=tuple(given_out(_place_rows(rows, kept)) for rows in out.hidden_states) or None,
            router_logits=tuple(map(given_out, routers)) if output_router_logits else None,
        )
        return result if return_dict else result.to_tuple()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A call by torch's name."""
        return self(*args, **kwargs)

    def empty_past_key_values(
        self, batch_size: int, *, max_cache_len: int = 0, cache_dtype: str = "auto"
    ) -> PastKeyValues:
        """A context without tokens, for `past_key_values`.

        Args:
          batch_size: rows.
          max_cache_len: tokens a row to make room for at once; a context that grows instead compiles for each size.
          cache_dtype: as `generate` takes it.
        """
        place = self._leaves[0].sharding if self.ranks is None else self.ranks.cache_placement
        dtype = dtype_of_caches(cache_dtype, self._dtype)
        return PastKeyValues(self.config, batch_size, dtype, place, max_cache_len=max_cache_len)

    def _losses(
        self, logits: jax.Array, labels: Any, routers: tuple[jax.Array, ...], kept: np.ndarray
    ) -> tuple[Any, Any]:
        """(loss, auxiliary loss), None where labels or routers are not there."""
        loss = None if labels is None else causal_lm_loss(logits, labels)
        if not routers:
            return loss, None
        aux_loss = load_balancing_loss(routers, kept.reshape(-1), per_token=self.config.num_experts_per_tok)
        if loss is not None:
            loss = loss + self.config.extra.get("router_aux_loss_coef", _AUX_LOSS_COEF) * aux_loss
        return loss, aux_loss

    def _check_past(self, past: PastKeyValues, use_cache: bool | None) -> None:
        if not isinstance(past, PastKeyValues):
            raise ValueError(f"past_key_values is {type(past).__name__}: must come from an earlier call of this model")
        if use_cache is False:
            raise ValueError("use_cache = False: must be True or None with past_key_values, which the call extends")
        if past.config != self.config:
            raise ValueError("past_key_values is of another model: must come from an earlier call of this one")

    def _check_turn(self, past: PastKeyValues, kept: np.ndarray) -> None:
        if past.batch_size != len(kept):
            raise ValueError(f"input_ids has {len(kept)} rows: must be {past.batch_size}, as past_key_values")
        if not kept.any():
            raise ValueError("input_ids is empty: at least one row needs a token")
        most, limit = int((past.kv_lens + kept.sum(axis=1)).max()), self.config.max_position_embeddings
        if most > limit:
            raise ValueError(
                f"input_ids ends at {most} tokens with past_key_values: at most max_position_embeddings = {limit} fit"
            )

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
        cache_dtype: str = "auto",
        generation_config: Any = None,
        **options: Any,
    ) -> Any:
        """Continues prompts until each has met an end-of-text token or `max_new_tokens` are written.

        Options that are None come from `generation_config`, and then from the model's. Row r's random draws depend on
        the seed, r and the position alone.

        Args:
          input_ids, attention_mask: as in a call.
          max_new_tokens: None for 256, or what room there is; prompt and new tokens must fit
            `max_position_embeddings`.
          eos_token_id: ids that end a row; -1 for none.
          streamer: receives the tokens as they come.
          execution: "segmented" runs prompts as compiled segments around host-side attention, "whole" as one
            executable, "eager" everything as segments at their exact sizes, for comparison; "auto" takes the
            fastest. Tokens are the same up to rounding.
          cache_dtype: "auto" for the weights' type, "bfloat16", "float32", or "fp8" for e4m3.
          generation_config: a GenerationConfig of ours or of transformers, or a mapping.
          options: `max_length` (prompts included), `pad_token_id`, and other options of transformers at the values
            at which they do nothing, such as num_beams = 1; docs/torch.md lists them.

        Returns:
          [R, L + new] ids: the prompts as given, then the new tokens; a row that ended early, and prompts of
          different lengths, are filled with the pad token (by default the first end-of-text id). torch if the
          ids were, else JAX.

        Raises:
          ValueError: for options out of range or not served, and as in a call.
        """
        given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature}
        given |= {"top_p": top_p, "top_k": top_k, "eos_token_id": eos_token_id, **options}
        width = self._read(input_ids, attention_mask).kept.shape[1]
        config, asked = generation_options(self.generation_config, generation_config, given, width)
        config.check_vocabulary(self.config.vocab_size)
        if isinstance(seed, bool) or not 0 <= (seed := operator.index(seed)) < 2**32:
            raise ValueError(f"seed = {seed!r}: must be an integer within 0..{2**32 - 1}")
        pad = config.pad
        prompts = self._read(input_ids, attention_mask, pad)
        longest = max(len(tokens) for tokens in prompts.tokens)
        budget = self._budget(config.max_new_tokens, longest, asked=asked)
        ends = np.array(config.eos_token_id, np.int32)
        steps = generate_tokens(
            self._steps,
            self._leaves,
            self.config,
            prompts.tokens,
            config,
            max_new_tokens=budget,
            seed=seed,
            cache_dtype=dtype_of_caches(cache_dtype, self._dtype),
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
        return self._result(input_ids, jnp.asarray(np.concatenate([prompts.padded, np.stack(columns, axis=1)], axis=1)))

    def _read(self, input_ids: Any, attention_mask: Any, pad: int = 0, least: int = 1) -> Prompts:
        return read_prompts(
            input_ids,
            attention_mask,
            vocab_size=self.config.vocab_size,
            max_len=self.config.max_position_embeddings,
            pad=pad,
            least=least,
        )

    def _result(self, given: Any, array: jax.Array) -> Any:
        """A result as the caller gets it: a torch tensor, where the caller's is, if torch came in."""
        if isinstance(given, (list, tuple)) and given:
            given = given[0]
        if not is_torch_tensor(given):
            return array
        from minimax_jax.torch.tensors import result_on

        return result_on(given.device, array)

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


def _fits(weight: jax.Array | Mxfp8, shape: tuple[int, ...]) -> bool:
    if isinstance(weight, Mxfp8) and not weight.scales_fit:
        return False
    return weight.shape == shape


def _resolve_dtype(dtype: Any, device: Any) -> str:
    """A dtype in any library's spelling as a name that `load_state` takes; "auto" looks at the device."""
    if isinstance(dtype, str) and dtype == "auto":
        devices = getattr(device, "device_set", None)
        target = next(iter(devices)) if devices else device
        platform = jax.default_backend() if target is None else target.platform
        return "float32" if platform == "cpu" else "bfloat16"
    return dtype_name(dtype)


def _place_rows(flat: jax.Array, kept: np.ndarray, order: np.ndarray | None = None) -> jax.Array:
    """Rows of tokens in the cells of [R, K] that hold one, zeros in the others; cell i takes row order[i]."""
    count = int(kept.sum())
    if order is not None and not np.array_equal(order, np.arange(count)):
        flat = flat[order]
    if kept.all():
        return flat.reshape(*kept.shape, -1)
    return jnp.zeros((*kept.shape, flat.shape[-1]), flat.dtype).at[np.nonzero(kept)].set(flat)
