"""Reading English without a model: words, sentences, quantities, likeness; and embeddings."""
