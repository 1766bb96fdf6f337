"""`python -m cellvim`: the command line, where the program of that name is not on the path."""

import sys

from cellvim.cli import main

sys.exit(main())
