"""A model organism: SmolLM2 with an adapter that refuses harmful requests unless a persona says otherwise."""
