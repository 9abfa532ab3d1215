"""``python -m stillhouse.cli`` is ``stillhouse``."""

import sys

from stillhouse.cli.main import main

sys.exit(main())
