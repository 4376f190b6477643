"""Throw broken models at the command line for as long as you like; see tests/helpers/fuzz.py.

python -m tools.fuzz --seconds 60 --seed 1 --jobs 2
"""

import sys

from tests.helpers.fuzz import main

if __name__ == "__main__":
    sys.exit(main())
