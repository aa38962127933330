"""Train one stage: ``python train.py --stage=1``; ``--help`` lists every setting."""

import sys

from lizard_jax.train.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
