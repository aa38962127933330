"""Several devices for a command that reads and writes text: its flags, and the mesh they ask for."""

import argparse
import contextlib
from collections.abc import Iterator

from lizard_jax.config import MeshConfig
from lizard_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--mesh-data``, ``--mesh-fsdp`` and ``--mesh-tensor``."""
    for axis, what in (("data", "rows"), ("fsdp", "rows, and weights by rows,"), ("tensor", "heads")):
        parser.add_argument(
            f"--mesh-{axis}", type=int, default=1, metavar="N", help=f"split {what} over N devices (default 1)"
        )


@contextlib.contextmanager
def over(args: argparse.Namespace) -> Iterator[None]:
    """Inside, ``partition.mesh()`` is the mesh that a command's flags ask for, and kernels run on it.

    Raises:
        UserError: an axis below one, or more devices than there are.
    """
    sizes = args.mesh_data, args.mesh_fsdp, args.mesh_tensor
    if sizes == (1, 1, 1):
        yield
        return
    from lizard_jax import sharding
    from pallas_kernels import partition

    if min(sizes) < 1:
        raise UserError("--mesh-data, --mesh-fsdp and --mesh-tensor are each at least 1")
    mesh = sharding.make_mesh(MeshConfig(*sizes), some=True)
    with partition.over(sharding.kernel_partition(mesh)):
        yield
