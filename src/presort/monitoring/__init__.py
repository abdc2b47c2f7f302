"""What was spent, and how it is shown to whoever pays."""
