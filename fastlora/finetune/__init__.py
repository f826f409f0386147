"""Complete fine-tuning programs on the fused layer: data, models, one trainer, one file per program."""
