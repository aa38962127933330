"""What earlier versions left behind is read as they read it."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.old.make import STUDENTS, some_logits


@pytest.mark.parametrize("archive", sorted(Path(__file__).parent.glob("*.tar.gz")), ids=lambda path: path.name)
def test_runs_and_exports_give_the_logits_they_gave(archive, tmp_path):
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    want = np.load(tmp_path / "expected.npz")
    for name in STUDENTS:
        np.testing.assert_allclose(some_logits(tmp_path / name), want[name.replace("/", "_")], atol=1e-5, err_msg=name)
