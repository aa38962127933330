"""A conversation in a small file: the model's state after it, to be continued as if it had never stopped."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lizard_jax import sharding
from lizard_jax.atomic import write_atomic
from lizard_jax.config import to_dict
from lizard_jax.errors import UserError
from lizard_jax.models.llama import Llama

FORMAT = "1"


@dataclass(frozen=True)
class Conversation:
    """Where a conversation stands.

    Attributes:
        state: the model's, after everything but ``pending``; used up by whoever goes on with it.
        pending: the last token written, not yet read.
        written: tokens written so far, which the next draws depend on.
        tokens: everything read and written, where a repetition penalty asks for it; else empty.
        messages: the chat so far, where there is one.
    """

    state: Any
    pending: Sequence[int]
    written: int
    tokens: Sequence[int] = ()
    messages: Sequence[dict[str, str]] = field(default_factory=tuple)


def fingerprint(model: Llama) -> str:
    """What tells one model from another: its configuration, and a sample of every parameter."""
    import flax.nnx as nnx

    settings = to_dict(model.config)
    for name in ("yarn", "longrope"):
        if settings["rope"][name] is None:
            del settings["rope"][name]  # states of before there was one are still known
    for name in ("softmax_heads", "retrieval_window", "budgets", "kept"):
        if settings["attention"] and not settings["attention"][name]:
            del settings["attention"][name]  # the same
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.state(model))[0]:
        digest.update(sharding.path_name(path).encode())
        digest.update(np.asarray(leaf.reshape(-1)[:64]).tobytes())
    return digest.hexdigest()


def save(path: str | Path, conversation: Conversation, model: Llama) -> int:
    """Writes the file, whole or not at all; returns its size in bytes.

    Raises:
        UserError: it cannot be written.
    """
    from safetensors.flax import save as encode

    target = Path(path).expanduser()
    leaves = jax.tree_util.tree_flatten_with_path(conversation.state)[0]
    header = {
        "format": FORMAT,
        "model": fingerprint(model),
        "rest": json.dumps(
            {
                "pending": list(conversation.pending),
                "written": conversation.written,
                "tokens": list(conversation.tokens),
                "messages": list(conversation.messages),
            }
        ),
    }
    data = encode({sharding.path_name(name): leaf for name, leaf in leaves}, metadata=header)
    try:
        write_atomic(target, data)
    except OSError as error:
        raise UserError(f"cannot write the state to {target}: {error.strerror or error}") from None
    return len(data)


def load(path: str | Path, model: Llama) -> Conversation:
    """Reads the file back into the state of ``model``.

    Raises:
        UserError: it is missing, damaged, no such file, or of another model.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path).expanduser()
    if not source.is_file():
        raise UserError(f"no saved state at {source}")
    try:
        with safe_open(source, framework="flax") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{source} is no saved state, or a damaged one: {error}") from None
    if header.get("format") != FORMAT:
        raise UserError(f"{source} is no state that --save-state wrote")
    if header.get("model") != fingerprint(model):
        raise UserError(f"{source} is the state of another model; load it with the model that it was saved from")
    rest = json.loads(header["rest"])
    empty = jax.eval_shape(lambda: model.init_state(1, held_capacity(arrays)))
    state = jax.tree_util.tree_map_with_path(lambda name, leaf: arrays[sharding.path_name(name)], empty)
    return Conversation(state, rest["pending"], rest["written"], rest["tokens"], rest["messages"])


def held_capacity(arrays: dict[str, Any]) -> int | None:
    """Tokens that the key/value caches among the tensors hold; None where there is no cache."""
    sizes = [leaf.shape[1] for name, leaf in arrays.items() if name.split("/")[-1] in ("k", "v")]
    return max(sizes, default=None)
