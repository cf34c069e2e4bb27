"""What is trained: a task owns its data, its model, its loss and its metrics."""
