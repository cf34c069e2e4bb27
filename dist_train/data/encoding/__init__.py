"""From the columns of a table to the three tensors of a model: fitted, saved, compared with other rows."""
