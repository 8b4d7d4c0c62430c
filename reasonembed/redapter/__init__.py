"""RI-InfoNCE fine-tuning: batches, loss, exact distributed step, loop and export."""
