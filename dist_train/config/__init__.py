"""What a run is: the schema, its loader and its cross-field rules."""
