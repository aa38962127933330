"""Convert checkpoints: ``python convert.py hf2flax SRC DST``, ``flax2hf``, ``linearize``; ``--help`` lists the rest."""

import sys

from lizard_jax.convert.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
