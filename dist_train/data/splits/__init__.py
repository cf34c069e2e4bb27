"""Which rows train, which validate, which test: at random, by group, by time."""
