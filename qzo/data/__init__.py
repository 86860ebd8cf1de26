"""Tasks with MeZO's prompts, their encoding and batches, and the loss that a step measures."""
