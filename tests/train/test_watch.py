"""What watches a run: traces of the steps asked for, and a page that takes the same numbers as ``metrics.jsonl``."""

import importlib.util
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from lizard_jax.errors import UserError
from lizard_jax.train.log import MetricsLog
from lizard_jax.train.watch import Profile, wandb_run


@pytest.mark.parametrize(("steps", "total", "traced"), [(0, 4, 0), (2, 4, 1), (9, 4, 1), (2, 1, 0)])
def test_a_trace_of_some_steps_also_of_a_run_that_ends_early(tmp_path, steps, total, traced):
    profile, step = Profile(tmp_path, 0, steps), jax.jit(lambda x: x + 1)
    x = jnp.zeros(())
    for index in range(total):
        profile.begin(index)
        x = step(x)
        profile.end(index, x)
    profile.close()
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == traced


class Page:
    """A run of wandb."""

    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished = True


def test_the_page_has_the_numbers_of_the_log(tmp_path):
    page = Page()
    log = MetricsLog(tmp_path, 0, writes=True, page=page)
    log.write({"step": 3, "loss": 2.5, "layers": [1.0, 2.0], "held_out": {"loss": 2.0}})
    log.close()
    assert page.finished
    numbers = {"train/loss": 2.5, "train_layers/0": 1.0, "train_layers/1": 2.0, "held_out/loss": 2.0}
    assert page.logged == [(3, numbers)]


def test_a_run_gone_on_with_is_one_run_there_too(tmp_path, monkeypatch):
    asked = []
    fake = SimpleNamespace(init=lambda **told: asked.append(told) or Page())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    place = tmp_path / "mine" / "stage1"
    place.mkdir(parents=True)
    for _ in range(2):
        assert isinstance(wandb_run("lizards", place, {"stage": 1}), Page)
    assert asked[0] == asked[1]
    assert (asked[0]["project"], asked[0]["name"], asked[0]["resume"]) == ("lizards", "mine/stage1", "allow")
    assert wandb_run("", tmp_path, {}) is None


def test_what_wandb_refuses_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--wandb needs the package wandb: uv run --with wandb"):
        wandb_run("lizards", tmp_path, {})

    def refuse(**told):
        raise RuntimeError("no\nkey")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="--wandb lizards: no key"):
        wandb_run("lizards", tmp_path, {})
