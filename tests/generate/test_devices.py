"""Commands over several devices: what they write and measure is what one device does."""

import json

import jax
import numpy as np
import pytest

import lizard_jax
from lizard_jax import sharding
from lizard_jax.config import DataConfig, LizardConfig, MeshConfig
from lizard_jax.convert.save import save_hf
from lizard_jax.embedded import teacher_path
from lizard_jax.eval.__main__ import main as measure
from lizard_jax.generate.__main__ import main as write
from lizard_jax.train.linearize import linearize
from pallas_kernels import partition
from tests.shallow import shallow

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Two layers of the embedded teacher with a window, kept pairs, a memory and one exact head."""
    place = tmp_path_factory.mktemp("student")
    teacher, out = shallow(place / "teacher"), place / "student"
    attention = LizardConfig(window=16, kept=4, softmax_heads=("1.0",))
    model, _ = linearize(teacher, attention, DataConfig(sequence_length=128), dtype="float32")
    save_hf(model, out, source=teacher)
    return out


def test_text_is_that_of_one_device(student, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def main(argv, out):\n", "import")))

    def told(*more: str) -> str:
        assert write([str(student), "--prompts", str(prompts), "--max-new-tokens", "12", *more]) == 0
        return capsys.readouterr().out

    assert told("--mesh-fsdp", "2", "--mesh-tensor", "4") == told()


@pytest.mark.usefixtures("x64")
def test_logits_and_state_lie_on_all_and_agree(student):
    tokens = np.arange(3, 51, dtype=np.int32).reshape(2, 24)
    alone = lizard_jax.load(student, dtype="float64")
    logits, state = jax.jit(lambda m, s: m.extend(tokens, s))(alone, alone.init_state(2, 32))
    mesh = sharding.make_mesh(MeshConfig(2, 1, 2), some=True)
    with partition.over(sharding.kernel_partition(mesh)):
        spread = lizard_jax.load(student, dtype="float64", mesh=mesh)
        found, there = jax.jit(lambda m, s: m.extend(tokens, s))(spread, spread.init_state(2, 32))
    np.testing.assert_allclose(found, logits, atol=1e-9)
    for one, other in zip(jax.tree.leaves(there), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), atol=1e-9)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(there)} == {4}


def test_a_measurement_is_that_of_one_device(student, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("def one(x):\n    return x + 1\n" * 40)

    def told(name: str, *more: str) -> dict:
        out = str(tmp_path / name)
        asked = ["--data", str(text), "--length", "64", "--tokens", "512", "--context-tokens", "0", "--out", out]
        assert measure(["perplexity", str(student), *asked, *more]) == 0
        return json.loads((tmp_path / name / "result.json").read_text())

    one, many = told("one"), told("many", "--mesh-data", "2", "--mesh-tensor", "2")
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (["--mesh-tensor", "9"], "a mesh of 9 devices was asked for, and there are 8"),
        (["--mesh-fsdp", "0"], "at least 1"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(capsys, mesh, words):
    assert write([str(teacher_path()), "--prompt", "x", *mesh]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
