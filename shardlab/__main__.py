"""`python -m shardlab` is `shardlab`."""

import sys

from shardlab.cli import main

sys.exit(main())
