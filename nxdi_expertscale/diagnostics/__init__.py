"""What is installed, what is patched, and what is wrong."""
