"""Metal kernels as package data, and the catalog that launches and tests read."""
