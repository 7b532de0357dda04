"""Who speaks: one protocol for a chat model, behind it a server, the engine in this process, or a script."""
