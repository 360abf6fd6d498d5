"""What plugins may add, and the plugins that are in force."""
