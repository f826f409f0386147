"""`python -m fastlora`: the command line."""

import sys

from fastlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
