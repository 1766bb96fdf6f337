"""Training: recipes, data modules, and what a training run leaves behind. The only part that needs Lightning."""
