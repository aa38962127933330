"""A run in a process of its own: ``python -m tests.train.worker DIR SECONDS_A_BATCH [FULL_AT_STEP]``."""

import resource
import sys
import time
from pathlib import Path

import tests.conftest  # noqa: F401  (the same devices and strictness as in the tests)
from lizard_jax.errors import UserError
from lizard_jax.train.loop import Trainer
from tests.train.tiny import RandomBatches, make_model, mesh_of, run_config


class SlowBatches(RandomBatches):
    """Batches that take a while, so that there is time to be killed in; from one on, no file may pass 6 kB."""

    def __init__(self, config, seconds: float, full_at: int) -> None:
        super().__init__(config)
        self.seconds, self.full_at = seconds, full_at

    def batch(self, step):
        time.sleep(self.seconds)
        if step == self.full_at:
            sys.dont_write_bytecode = True  # what Python compiles would be cut short, and not told
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        return super().batch(step)


if __name__ == "__main__":
    settings = run_config(1, steps=8, validate_every=2)
    batches = SlowBatches(settings.data, float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else -1)
    try:
        Trainer(settings, make_model(settings), batches, Path(sys.argv[1]), mesh_of()).run()
    except UserError as error:
        sys.exit(f"error: {error}")
