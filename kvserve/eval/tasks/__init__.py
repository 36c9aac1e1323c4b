"""Tasks that are made from a seed and scored exactly."""
