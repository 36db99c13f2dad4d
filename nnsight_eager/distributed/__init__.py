"""A model that several processes run together: its points are read whole, and every rank asks for the same ones."""
