"""A decode trace driven through the original per-step preparation and through this package's, value by value."""
