"""What differs between families of mixture-of-experts models, declared as data."""
