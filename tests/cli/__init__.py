"""Tests of what users type, in processes of a real installation.

:mod:`tests.harness.installed` builds the wheel and installs it in a fresh virtual environment. What
the package depends on is reached through a path file that is read after ours, so that every test
here also runs with the ``sys.path`` that a start-up file gets to see.
"""
