"""Installations with other Pythons and other releases of torch; see ``tox -e packaging``."""
