"""Fine-tuning: rows, packs of samples, the trainer."""
