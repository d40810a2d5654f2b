"""Training: preference pairs and LoRA reward models."""
