"""Group relative policy optimisation on long videos."""
