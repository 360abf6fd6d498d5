"""Nothing but what is in it."""
