"""The embedded teacher's first layers as a checkpoint: its tokenizer and its shape in a third of the compiling."""

from pathlib import Path

from safetensors.numpy import load_file, save_file

from lizard_jax.convert.files import read_json, write_json
from lizard_jax.embedded import teacher_path

LAYERS = 2


def shallow(directory: Path) -> Path:
    """Writes it to a new ``directory``, which is returned. It can be read and run, and predicts nothing well."""
    directory.mkdir()
    for file in teacher_path().iterdir():
        if file.suffix == ".json":
            (directory / file.name).write_bytes(file.read_bytes())
    write_json(directory / "config.json", read_json(directory / "config.json") | {"num_hidden_layers": LAYERS})
    tensors = load_file(teacher_path() / "model.safetensors")
    kept = [name for name in tensors if not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS]
    save_file({name: tensors[name] for name in kept}, directory / "model.safetensors", {"format": "pt"})
    return directory
