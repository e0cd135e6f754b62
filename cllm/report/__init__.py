"""Results -> tables and plots."""
