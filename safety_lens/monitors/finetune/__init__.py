"""Fine-tuning with the monitor: a configuration in, an adapter and a log of what moved out."""
