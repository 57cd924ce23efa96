"""Before training: what a planned fine-tune is likely to do to the model's safe answers. See monitors.forecast."""
