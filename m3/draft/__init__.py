"""The draft model's life: prompts and self-generated data, teacher states, training, evaluation, checkpoint layouts."""
