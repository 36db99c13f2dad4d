"""A run driven by hand: what holds a forward pass open at the prompt, and walks through it."""
