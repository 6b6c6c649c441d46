"""``python -m videor1.cli --table``: the name that ``videor1.config.cli`` had."""

import sys

from videor1.config.cli import main

if __name__ == "__main__":
    sys.exit(main())
