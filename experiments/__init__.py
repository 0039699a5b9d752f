"""What is run with hypertorch: data, models, the training loop, the demo and the benchmark."""
