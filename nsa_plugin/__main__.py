"""`python -m nsa_plugin` is `nsa-plugin`."""

import sys

from nsa_plugin.cli import main

sys.exit(main())
