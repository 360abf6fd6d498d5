"""``python -m nxdi_expertscale``, the same as the console script."""

from nxdi_expertscale.cli import main

main()
