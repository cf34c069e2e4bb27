"""Tables of typed columns: which columns are read, what the target and the weights are, and a file in chunks."""
