"""A tokenizer for small random models."""

import shutil
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from minimax_jax.paths import model_directory

SPECIAL = ["]~b]", "[e~[", "]~!b["]
PLAIN = ["<mm:think>", "</mm:think>"]


def write_tokenizer(folder: Path) -> None:
    """One token a byte, and M3's markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in PLAIN])
    backend.save(str(folder / "tokenizer.json"))
    shutil.copy(model_directory("tiny") / "chat_template.jinja", folder)
