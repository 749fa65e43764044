"""What models are fine-tuned for: how their answers are scored."""
