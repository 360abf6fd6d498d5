"""``python -m nxdi_expertscale``, the same as the console script."""

from nxdi_expertscale import working_directory

# Again: where NXDI_PLUGINS is set, the package was imported before the path was complete.
working_directory.leave_off_path()

if __name__ == "__main__":
    from nxdi_expertscale.cli import main

    main()
