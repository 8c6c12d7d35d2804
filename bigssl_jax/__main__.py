"""`python -m bigssl_jax`: the same as the `bigssl` command."""

import sys

from bigssl_jax.cli import main

if __name__ == '__main__':
    sys.exit(main())
