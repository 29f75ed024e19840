"""What `evaluate` imports for a metric's name: one file each, holding one class."""
