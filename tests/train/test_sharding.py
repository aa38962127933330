import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lizard_jax import sharding
from lizard_jax.config import MeshConfig
from lizard_jax.errors import UserError
from lizard_jax.train.optim import Optimizer
from lizard_jax.train.step import place
from tests.train.tiny import make_model, mesh_of, run_config


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(2, -1, 2), (2, 2, 2, 1)),
        (MeshConfig(-1, 1, 4), (2, 1, 4, 1)),
        (MeshConfig(2, 2, 2), (2, 2, 2, 1)),
        (MeshConfig(seq=4), (1, 2, 1, 4)),
    ],
)
def test_mesh_shape(config, shape):
    assert sharding.mesh_shape(config, 8) == shape


@pytest.mark.parametrize(
    "config", [MeshConfig(3, -1, 1), MeshConfig(2, 2, 1), MeshConfig(-1, -1, 1), MeshConfig(0, 8, 1)]
)
def test_a_mesh_that_does_not_cover_the_devices_is_refused(config):
    with pytest.raises(UserError, match="mesh"):
        sharding.mesh_shape(config, 8)


def test_batch_must_divide():
    with pytest.raises(UserError, match="6"):
        sharding.check_batch(6, mesh_of(data=2, fsdp=4))


def test_parameters_and_their_moments_lie_as_the_table_says():
    config = run_config(2, full=True)
    mesh = mesh_of(fsdp=2, tensor=2)
    state = place(config, make_model(config), Optimizer(config.optim, 4), mesh)

    def specs(tree, ending):
        found = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {leaf.sharding.spec for path, leaf in found if sharding.path_name(path).endswith(ending)}

    for tree in (state.trainable, state.optimizer):
        assert specs(tree, "layers/0/attention/q_proj/kernel") == {P("fsdp", "tensor")}
        assert specs(tree, "layers/1/attention/o_proj/kernel") == {P("tensor", "fsdp")}
        assert specs(tree, "layers/1/mlp/down_proj/kernel") == {P("tensor", "fsdp")}
        assert specs(tree, "embed/embedding") == {P("tensor", "fsdp")}
        assert specs(tree, "attention_norm/weight") == {P()}
        assert specs(tree, "mixer/phi_q/kernel") == {P("tensor", "fsdp", None)}
    assert len(specs(state.optimizer, "q_proj/kernel")) == 1


def test_an_axis_that_does_not_divide_leaves_its_dimension_whole():
    sizes = {"data": 1, "fsdp": 4, "tensor": 3}
    assert sharding.partition_spec("layers/0/mlp/up_proj/kernel", (8, 10), sizes) == P("fsdp", None)


def test_devices_that_share_a_text_have_a_part_of_the_weights_each():
    sizes = {"data": 1, "fsdp": 2, "tensor": 1, "seq": 4}
    assert sharding.partition_spec("layers/0/mlp/up_proj/kernel", (8, 10), sizes) == P(("fsdp", "seq"), "tensor")
    assert sharding.partition_spec("layers/0/attention/mixer/phi_q/kernel", (2, 8, 4), sizes) == P(
        "tensor", "fsdp", None
    )


def test_a_text_that_cannot_be_split_is_refused():
    mesh = mesh_of(fsdp=2, seq=4)
    sharding.check_split(64, 4, mesh)
    with pytest.raises(UserError, match=r"sequence-length=30.*multiple of 4"):
        sharding.check_split(30, 4, mesh)
    with pytest.raises(UserError, match=r"key heads.*has 2"):
        sharding.check_split(64, 2, mesh)


def test_put_places_values_unchanged():
    mesh = mesh_of(data=2, fsdp=4)
    rows = np.arange(16, dtype=np.int32).reshape(8, 2)
    placed = sharding.put(rows, sharding.batch_sharding(mesh))
    assert placed.addressable_shards[0].data.shape == (1, 2)
    chex.assert_trees_all_equal(np.asarray(placed), rows)


@pytest.mark.parametrize(
    ("environment", "joins", "note"),
    [
        ({}, False, ""),
        ({"SLURM_NTASKS": "8"}, False, "start it with srun"),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "node[1-2]"}, True, ""),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, False, ""),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True, ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, ""),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False, ""),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True, ""),
    ],
)
def test_a_launch_of_many_processes_is_joined_and_no_other(monkeypatch, capsys, environment, joins, note):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **more: joined.append(args))
    sharding.start_distributed()
    assert bool(joined) == joins
    message = capsys.readouterr().err
    assert (note in message) if note else (message == "")
