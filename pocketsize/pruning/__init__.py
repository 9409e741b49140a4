"""Which channels to drop."""
