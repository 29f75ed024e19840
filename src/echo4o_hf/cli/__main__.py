"""`python -m echo4o_hf.cli`, for `accelerate launch`."""

import sys

from .parser import main

if __name__ == "__main__":
    sys.exit(main())
