"""Makes `accelerate launch -m hpdist ...` and `python -m hpdist ...` work."""

import sys

from hpdist.cli import main

if __name__ == "__main__":
    sys.exit(main())
