"""Language models: where they come from (hub), how they are read (loader) and what they compute (decoder)."""
