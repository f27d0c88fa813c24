"""What a run will need, from its recipe and the model's configuration alone: no weight is loaded."""
