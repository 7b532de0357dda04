"""OpenAI-compatible servers: of an engine (``m3 serve``), and of the patient (``m3 clinic patient``)."""
