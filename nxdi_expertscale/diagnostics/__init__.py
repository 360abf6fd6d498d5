"""What is installed, what became of the patches, and what is wrong: the command ``doctor``."""
