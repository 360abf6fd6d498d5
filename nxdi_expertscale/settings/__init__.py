"""What a configuration asks for, and whether it can work, before anything is compiled."""
