"""From a table file to batches: table, split, encoder, sampler, feed."""
