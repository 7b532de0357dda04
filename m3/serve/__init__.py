"""OpenAI-compatible HTTP over whoever can answer a chat: the engine, or a patient."""
